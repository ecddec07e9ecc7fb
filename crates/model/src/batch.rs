//! What goes through the decoder at once: whole documents, chunks of prompts, single tokens.

use std::ops::Range;

use updraft_kernels::noise::derive;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Tokens of one or more sequences, laid end to end.
///
/// The same type describes a training micro-batch, a prefill, a decode step or a mix: sequence `s`
/// owns rows `seq_starts[s]..seq_starts[s + 1]`, and no sequence ever sees another's rows. Without
/// `kv` each sequence is complete in itself; with it, a sequence's earlier tokens lie in
/// [`KvPages`](crate::KvPages).
///
/// ```
/// let batch = updraft_model::Batch::packed([&[5, 6, 7][..], &[8, 9]]);
/// assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
/// assert_eq!(batch.seq_starts, [0, 3, 5]);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// Each token's position in its sequence, `[T]`; rising by one within a sequence.
    pub positions: Vec<u32>,
    /// Where each sequence starts, and the end: `num_sequences + 1` rising numbers from 0 to `T`.
    pub seq_starts: Vec<u32>,
    /// The pages of each sequence, when serving.
    pub kv: Option<BlockTables>,
    /// For each sequence which of the given adapters it uses; empty for none at all.
    pub adapters: Vec<Option<usize>>,
    /// The rows whose hidden state is asked for, in the order it is returned.
    pub logit_rows: Vec<u32>,
}

/// Which pages hold each sequence.
///
/// The token at position `p` of sequence `s` lies in page `tables[s][p / block_size]`, slot
/// `p % block_size`. A forward pass writes its new tokens there and reads positions `0..=p`; every
/// other page is left alone, so a caller may share full pages between sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTables {
    /// Tokens per page; that of the pages.
    pub block_size: usize,
    /// Page numbers of each sequence, in order.
    pub tables: Vec<Vec<u32>>,
}

impl Batch {
    /// Whole documents end to end, positions from zero in each, no logits asked for.
    pub fn packed<'a>(documents: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self {
            seq_starts: vec![0],
            ..Self::default()
        };
        for ids in documents {
            batch.push(ids, 0);
        }
        batch
    }

    /// Appends a sequence whose first token has position `start`; returns its rows.
    pub fn push(&mut self, ids: &[u32], start: u32) -> Range<u32> {
        if self.seq_starts.is_empty() {
            self.seq_starts.push(0);
        }
        let first = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.positions.extend((start..).take(ids.len()));
        let end = self.ids.len() as u32;
        self.seq_starts.push(end);
        first..end
    }

    /// How many tokens, `T`.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// How many sequences.
    pub fn num_sequences(&self) -> usize {
        self.seq_starts.len().saturating_sub(1)
    }

    /// The rows of sequence `s`.
    pub fn rows(&self, s: usize) -> Range<usize> {
        self.seq_starts[s] as usize..self.seq_starts[s + 1] as usize
    }

    /// Checks the batch against itself, the model and the number of adapters.
    ///
    /// # Errors
    /// [`Error::Batch`] with the first contradiction.
    pub fn validate(&self, config: &ModelConfig, num_adapters: usize) -> Result<()> {
        let tokens = self.ids.len();
        if self.positions.len() != tokens {
            return Err(Error::batch(format!(
                "{} positions for {tokens} tokens",
                self.positions.len()
            )));
        }
        if self.seq_starts.first() != Some(&0)
            || self.seq_starts.last().map(|&end| end as usize) != Some(tokens)
        {
            return Err(Error::batch(format!(
                "sequence starts must run from 0 to {tokens}"
            )));
        }
        if let Some(pair) = self.seq_starts.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(Error::batch(format!(
                "a sequence from row {} to row {} has no tokens",
                pair[0], pair[1]
            )));
        }
        if let Some(id) = self
            .ids
            .iter()
            .find(|&&id| id as usize >= config.vocab_size)
        {
            return Err(Error::batch(format!(
                "token id {id} is outside the vocabulary of {}",
                config.vocab_size
            )));
        }
        if let Some(row) = self.logit_rows.iter().find(|&&row| row as usize >= tokens) {
            return Err(Error::batch(format!(
                "logit row {row} is beyond the {tokens} tokens"
            )));
        }
        for s in 0..self.num_sequences() {
            self.validate_positions(s, config.max_len())?;
        }
        self.validate_adapters(num_adapters)?;
        self.kv
            .as_ref()
            .map_or(Ok(()), |kv| self.validate_tables(kv))
    }

    fn validate_positions(&self, s: usize, max_len: usize) -> Result<()> {
        let positions = &self.positions[self.rows(s)];
        if positions
            .windows(2)
            .any(|pair| pair[0].checked_add(1) != Some(pair[1]))
        {
            return Err(Error::batch(format!(
                "positions of sequence {s} do not rise by one"
            )));
        }
        if self.kv.is_none() && positions[0] != 0 {
            return Err(Error::batch(format!(
                "sequence {s} starts at position {} without pages",
                positions[0]
            )));
        }
        match positions.last() {
            Some(&last) if last as usize >= max_len => Err(Error::batch(format!(
                "sequence {s} reaches position {last}, the model ends at {max_len}"
            ))),
            _ => Ok(()),
        }
    }

    fn validate_adapters(&self, num_adapters: usize) -> Result<()> {
        if !self.adapters.is_empty() && self.adapters.len() != self.num_sequences() {
            let (given, sequences) = (self.adapters.len(), self.num_sequences());
            return Err(Error::batch(format!(
                "{given} adapter choices for {sequences} sequences"
            )));
        }
        match self
            .adapters
            .iter()
            .flatten()
            .find(|&&adapter| adapter >= num_adapters)
        {
            Some(adapter) => Err(Error::batch(format!("adapter {adapter} of {num_adapters}"))),
            None => Ok(()),
        }
    }

    fn validate_tables(&self, kv: &BlockTables) -> Result<()> {
        if kv.tables.len() != self.num_sequences() || kv.block_size == 0 {
            let (tables, sequences) = (kv.tables.len(), self.num_sequences());
            return Err(Error::batch(format!(
                "{tables} block tables for {sequences} sequences"
            )));
        }
        for (s, table) in kv.tables.iter().enumerate() {
            let len = self.positions[self.rows(s).end - 1] as usize + 1;
            if table.len() * kv.block_size < len {
                return Err(Error::batch(format!(
                    "sequence {s} of {len} tokens has only {} pages",
                    table.len()
                )));
            }
        }
        Ok(())
    }
}

/// Documents to learn from: a [`Batch`] whose logit rows each have a label.
///
/// A micro-batch is one or more parts. Parts share nothing, so
/// [`Decoder::loss_and_backward`](crate::Decoder::loss_and_backward) runs them side by side.
///
/// ```
/// let mut part = updraft_model::Part::default();
/// part.push(&[3, 4, 5, 6], &[2..4]); // 5 and 6 are to be learned
/// assert_eq!(part.batch.logit_rows, [1, 2]); // predicted from 4 and 5
/// assert_eq!(part.labels, [5, 6]);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    /// The documents.
    pub batch: Batch,
    /// The id each logit row should predict, `[N]`.
    pub labels: Vec<u32>,
    /// A number for each document that no other document of the run has, from which dropout and
    /// noise are drawn; needed only where an adapter has dropout or `neftune_noise_alpha` is set.
    pub seeds: Vec<u64>,
    /// Noise added to the embeddings of a document of `T` tokens: uniform up to
    /// `neftune_noise_alpha / √(T·C)`. Zero adds none.
    ///
    /// # Source
    /// Jain et al. 2023, <https://arxiv.org/abs/2310.05914>
    pub neftune_noise_alpha: f64,
}

impl Part {
    /// Appends a document and the spans of its tokens that are to be learned.
    ///
    /// A token is predicted from the one before it, so a document's first is never a label.
    pub fn push(&mut self, ids: &[u32], loss_spans: &[Range<usize>]) {
        let rows = self.batch.push(ids, 0);
        for position in loss_spans
            .iter()
            .cloned()
            .flatten()
            .filter(|&position| 0 < position && position < ids.len())
        {
            self.batch.logit_rows.push(rows.start + position as u32 - 1);
            self.labels.push(ids[position]);
        }
    }

    /// A key for each token, `[T]`; none without seeds.
    pub(crate) fn row_keys(&self) -> Vec<u64> {
        let keys = self.seeds.iter().enumerate().flat_map(|(document, &seed)| {
            (0..self.batch.rows(document).len()).map(move |position| derive(seed, position as u64))
        });
        keys.collect()
    }

    /// How many tokens are predicted.
    pub fn num_labels(&self) -> usize {
        self.labels.len()
    }
}
