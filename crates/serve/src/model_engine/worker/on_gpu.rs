//! Tokens chosen on the GPU that computed their logits: only the ids come to the host.

use updraft_model::{Choice, Edit, Hidden};

use super::super::guard::{Failure, guard};
use super::super::sequence::Row;
use super::Worker;

/// How the rows of a chunk are chosen from.
struct Plan {
    /// One for each row; what the host chooses from is drawn here for nothing.
    choices: Vec<Choice>,
    edits: Vec<Edit>,
    /// Rows whose logits somebody wants to see.
    on_host: Vec<u32>,
}

const LIKELIEST: Choice = Choice {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.0,
};

impl Worker {
    /// Chooses a token for every row that allows it, and hands the logits of the others to the host. After an error
    /// nothing was done.
    pub(super) fn use_rows_on_gpu(&mut self, hidden: &Hidden, rows: &[Row]) -> Result<(), Failure> {
        let plan = self.plan(rows);
        let (tokens, logits) = guard(|| {
            let mut all = self.decoder.logits(hidden)?;
            let logits = all.pick(&plan.on_host)?; // before they are changed
            let tokens = match plan.on_host.len() == rows.len() {
                true => Vec::new(),
                false => all.sample(&plan.choices, &plan.edits)?,
            };
            Ok((tokens, logits))
        })?;
        let mut logits = logits.chunks_exact(self.decoder.config().vocab_size);
        let mut on_host = plan.on_host.iter().peekable();
        for (at, &row) in rows.iter().enumerate() {
            if on_host.next_if(|&&row| row as usize == at).is_some() {
                let logits = logits.next().expect("copied above");
                self.use_logits(&[row], logits);
            } else if let Some(token) = tokens[at] {
                self.or_fail(row, |worker| worker.chosen(row.id(), token, None));
            } else {
                self.explain(hidden, at, row); // No logit was finite: the host finds out whose fault that is.
            }
        }
        Ok(())
    }

    fn explain(&mut self, hidden: &Hidden, at: usize, row: Row) {
        let logits = guard(|| {
            let hidden = hidden.rows(at..at + 1)?;
            Ok(self.decoder.logits(&hidden)?.to_vec()?)
        });
        match logits {
            Ok(logits) => self.use_logits(&[row], &logits),
            Err(failure) => self.fail(row.id(), &failure.cause),
        }
    }

    fn plan(&self, rows: &[Row]) -> Plan {
        let mut plan = Plan {
            choices: Vec::with_capacity(rows.len()),
            edits: Vec::new(),
            on_host: Vec::new(),
        };
        for (at, row) in rows.iter().enumerate() {
            let next = match row {
                Row::Next(id) => self.sequences.get(id),
                Row::Prompt(..) | Row::Embed(_) => None,
            };
            let choice = next.and_then(|sequence| sequence.choice(at as u32, &mut plan.edits));
            if choice.is_none() {
                plan.on_host.push(at as u32);
            }
            plan.choices.push(choice.unwrap_or(LIKELIEST));
        }
        plan
    }
}
