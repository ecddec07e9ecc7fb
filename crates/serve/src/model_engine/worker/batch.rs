//! A planned step as the decoder wants it.

use updraft_model::{Batch, BlockTables};

use super::super::registry::Generation;
use super::super::sequence::Row;
use super::Worker;
use crate::scheduler::Step;

impl Worker {
    /// The slices as the decoder wants them, the adapters they use, and what each row of logits is
    /// for.
    pub(super) fn batch(&self, step: &Step) -> (Batch, Vec<Generation>, Vec<Row>) {
        let mut batch = Batch::default();
        let mut generations: Vec<Generation> = Vec::new();
        let mut rows = Vec::new();
        let mut tables = Vec::with_capacity(step.slices.len());
        for slice in &step.slices {
            let sequence = &self.sequences[&slice.id];
            let end = (slice.start + slice.len) as usize;
            let first = batch
                .push(&sequence.tokens[slice.start as usize..end], slice.start)
                .start;
            tables.push(self.scheduler.block_table(slice.id).to_vec());
            let adapter = sequence.adapter.as_ref().map(|adapter| {
                let known = generations
                    .iter()
                    .position(|known| known.number == adapter.number);
                known.unwrap_or_else(|| {
                    generations.push(adapter.clone());
                    generations.len() - 1
                })
            });
            batch.adapters.push(adapter);
            for (position, row) in sequence.rows(slice) {
                batch.logit_rows.push(first + position - slice.start);
                rows.push(row);
            }
        }
        let block_size = self.kv.block_size();
        batch.kv = Some(BlockTables { block_size, tables });
        (batch, generations, rows)
    }
}
