//! Which tokens of which sequences the next forward pass computes: a pure state machine.

use std::collections::{BTreeMap, VecDeque};

use crate::blocks::BlockAllocator;
use crate::error::{Error, Result};

/// A sequence's name inside one scheduler; larger is younger.
pub type SequenceId = u64;

/// What the scheduler may spend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Sequences in one batch: more is more throughput, and more time per token for each.
    pub max_num_seqs: usize,
    /// Tokens in one forward pass. Prompts are cut to fit, so a smaller budget keeps the running
    /// completions fluent while long prompts come in. At least `max_num_seqs`.
    pub max_num_batched_tokens: u32,
    /// Blocks of KV cache to hand out.
    pub num_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Requests that may wait; one more is refused.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait. A single waiting prompt may exceed it.
    pub max_queued_tokens: u64,
}

impl SchedulerConfig {
    /// Checks that every sequence can make progress.
    ///
    /// # Errors
    /// [`Error::Options`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: &str| Err(Error::Options(message.to_owned()));
        if self.max_num_seqs == 0 {
            return refuse("max_num_seqs must be at least 1");
        }
        if (self.max_num_batched_tokens as usize) < self.max_num_seqs {
            return refuse("max_num_batched_tokens must be at least max_num_seqs");
        }
        if self.block_size == 0 || self.num_blocks == 0 {
            return refuse("block_size and num_blocks must be at least 1");
        }
        if self.max_queued_requests == 0 {
            return refuse("max_queued_requests must be at least 1");
        }
        Ok(())
    }

    fn blocks_for(&self, tokens: u32) -> usize {
        tokens.div_ceil(self.block_size) as usize
    }
}

/// The tokens of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Whose tokens.
    pub id: SequenceId,
    /// The position of the first.
    pub start: u32,
    /// How many.
    pub len: u32,
    /// Whether the slice reaches the sequence's last token, so that the next one can be chosen.
    pub is_last: bool,
}

/// One forward pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// Decoding sequences first, then prompts.
    pub slices: Vec<Slice>,
    /// Sequences that lost their blocks; they wait and will be computed from the start.
    pub preempted: Vec<SequenceId>,
}

/// Continuous batching on one token budget.
///
/// Each step, every completion under way gets one token; what is left of the budget goes to
/// prompts, oldest first, cut where the budget ends. A sequence enters the batch when blocks for
/// all its tokens so far are free. When a completion needs a block and none is free, the youngest
/// sequence gives its blocks back and is computed again later.
///
/// The caller runs the step, calls [`computed`](Self::computed), and for each slice that
/// [is last](Slice::is_last) either [`appended`](Self::appended) or [`finish`](Self::finish).
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockAllocator,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Oldest first; what was preempted is at the front.
    waiting: VecDeque<SequenceId>,
    /// In the order they entered the batch.
    running: Vec<SequenceId>,
    preemptions: u64,
}

#[derive(Debug)]
struct Sequence {
    /// Prompt and completion so far.
    num_tokens: u32,
    /// Tokens whose keys and values are in the cache.
    num_computed: u32,
    blocks: Vec<u32>,
}

impl Sequence {
    fn pending(&self) -> u32 {
        self.num_tokens - self.num_computed
    }
}

impl Scheduler {
    /// A scheduler with nothing to do.
    ///
    /// # Errors
    /// As [`SchedulerConfig::validate`].
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            blocks: BlockAllocator::new(config.num_blocks),
            config,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
        })
    }

    /// Queues a sequence of `prompt_tokens` that may grow to `max_tokens` more.
    ///
    /// # Errors
    /// [`Error::ContextLength`] if it could never fit the cache, [`Error::Overloaded`] if the
    /// queue is full.
    ///
    /// # Panics
    /// If `id` is already known.
    pub fn admit(&mut self, id: SequenceId, prompt_tokens: u32, max_tokens: u32) -> Result<()> {
        let capacity = self
            .config
            .num_blocks
            .saturating_mul(self.config.block_size);
        if prompt_tokens.saturating_add(max_tokens) > capacity {
            return Err(Error::ContextLength {
                prompt_tokens,
                max_tokens,
                max_model_len: capacity,
            });
        }
        let queued_tokens: u64 = self
            .waiting
            .iter()
            .map(|id| u64::from(self.sequences[id].num_tokens))
            .sum();
        let too_many = self.waiting.len() >= self.config.max_queued_requests;
        let too_long = queued_tokens + u64::from(prompt_tokens) > self.config.max_queued_tokens;
        if too_many || (too_long && !self.waiting.is_empty()) {
            return Err(Error::Overloaded {
                retry_after: std::time::Duration::from_secs(1),
            });
        }
        let fresh = Sequence {
            num_tokens: prompt_tokens,
            num_computed: 0,
            blocks: Vec::new(),
        };
        let known = self.sequences.insert(id, fresh);
        assert!(known.is_none(), "sequence {id} is admitted twice");
        self.waiting.push_back(id);
        Ok(())
    }

    /// Plans the next forward pass; empty if there is nothing to do.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        let mut budget = self.config.max_num_batched_tokens;
        self.schedule_decodes(&mut step, &mut budget);
        self.schedule_prompts(&mut step, &mut budget);
        if step.preempted.is_empty() {
            self.admit_waiting(&mut step, &mut budget);
        }
        step
    }

    fn schedule_decodes(&mut self, step: &mut Step, budget: &mut u32) {
        let mut index = 0;
        while index < self.running.len() {
            let id = self.running[index];
            if self.sequences[&id].pending() == 1 {
                if !self.make_room(id, step) {
                    break; // It was the youngest, and gave up its own place.
                }
                self.push_slice(id, step, budget);
            }
            index += 1;
        }
    }

    fn schedule_prompts(&mut self, step: &mut Step, budget: &mut u32) {
        for id in self.running.clone() {
            if *budget == 0 {
                break;
            }
            if self.sequences[&id].pending() > 1 {
                self.push_slice(id, step, budget);
            }
        }
    }

    fn admit_waiting(&mut self, step: &mut Step, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some(&id) = self.waiting.front() else {
                break;
            };
            let sequence = self
                .sequences
                .get_mut(&id)
                .expect("waiting sequences are known");
            let needed = self.config.blocks_for(sequence.num_tokens);
            let Some(blocks) = self.blocks.take(needed) else {
                break;
            };
            sequence.blocks = blocks;
            self.waiting.pop_front();
            self.running.push(id);
            self.push_slice(id, step, budget);
        }
    }

    /// Gets `id` the block its next token needs, preempting from the young end. `false` if `id`
    /// itself had to go.
    fn make_room(&mut self, id: SequenceId, step: &mut Step) -> bool {
        let sequence = &self.sequences[&id];
        let missing = self.config.blocks_for(sequence.num_tokens) - sequence.blocks.len();
        loop {
            if let Some(blocks) = self.blocks.take(missing) {
                self.sequences
                    .get_mut(&id)
                    .expect("running")
                    .blocks
                    .extend(blocks);
                return true;
            }
            let victim = self.running.pop().expect("`id` itself is running");
            let sequence = self
                .sequences
                .get_mut(&victim)
                .expect("running sequences are known");
            sequence.num_computed = 0;
            self.blocks.give_back(std::mem::take(&mut sequence.blocks));
            self.waiting.push_front(victim);
            self.preemptions += 1;
            step.preempted.push(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn push_slice(&mut self, id: SequenceId, step: &mut Step, budget: &mut u32) {
        let sequence = &self.sequences[&id];
        let len = sequence.pending().min(*budget);
        *budget -= len;
        let is_last = len == sequence.pending();
        step.slices.push(Slice {
            id,
            start: sequence.num_computed,
            len,
            is_last,
        });
    }

    /// Notes that a step's keys and values are in the cache.
    pub fn computed(&mut self, step: &Step) {
        for slice in &step.slices {
            if let Some(sequence) = self.sequences.get_mut(&slice.id) {
                sequence.num_computed += slice.len;
            }
        }
    }

    /// Notes that a sequence grew by one token.
    pub fn appended(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.num_tokens += 1;
        }
    }

    /// Forgets a sequence, done or cancelled, and frees its blocks. `false` if it was not known.
    pub fn finish(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.remove(&id) else {
            return false;
        };
        self.blocks.give_back(sequence.blocks);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        true
    }

    /// The blocks of a sequence, in the order of its tokens.
    #[must_use]
    pub fn block_table(&self, id: SequenceId) -> &[u32] {
        self.sequences
            .get(&id)
            .map_or(&[], |sequence| &sequence.blocks)
    }

    /// Sequences in the batch.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    #[must_use]
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Free blocks and all blocks.
    #[must_use]
    pub fn block_usage(&self) -> (usize, usize) {
        (self.blocks.num_free(), self.blocks.num_blocks())
    }

    /// Sequences preempted since the start.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }
}

#[cfg(test)]
mod tests;
