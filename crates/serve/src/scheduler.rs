//! Which tokens of which sequences the next forward pass computes: a pure state machine.

use std::collections::{BTreeMap, VecDeque};

use crate::blocks::BlockAllocator;
use crate::error::{Error, Result};
use crate::prefix::{PrefixChain, PrefixRoot};

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
    /// Requests that may wait; one more is refused, unless it is a choice of the only one.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait. What waits alone may exceed it.
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
    /// Sequences that lost their blocks; they wait and will be computed again.
    pub preempted: Vec<SequenceId>,
    /// Sequences that enter the batch for the first time, and how many of their tokens' keys and
    /// values lay in the cache already.
    pub started: Vec<(SequenceId, u32)>,
}

/// Continuous batching on one token budget.
///
/// Each step, every completion under way gets one token; what is left of the budget goes to
/// prompts, oldest first, cut where the budget ends. A sequence enters the batch when blocks for
/// all its tokens so far are free; full blocks that another sequence of the same tokens left in
/// the cache are shared instead of computed. When a completion needs a block and none is free, the
/// youngest sequence gives its blocks back and is computed again later.
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
    counts: Counts,
}

/// A sequence that wants to be queued.
#[derive(Debug, Clone, Copy)]
pub struct Newcomer<'a> {
    /// Its tokens so far.
    pub prompt: &'a [u32],
    /// By how many it may grow.
    pub max_tokens: u32,
    /// With whom it shares blocks; `None` shares nothing.
    pub root: Option<PrefixRoot>,
}

impl Newcomer<'_> {
    fn num_tokens(&self) -> u32 {
        u32::try_from(self.prompt.len()).unwrap_or(u32::MAX)
    }
}

/// What has happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that lost their blocks to an older one.
    pub preemptions: u64,
    /// Tokens of sequences that looked for their prefix in the cache.
    pub prefix_cache_queries: u64,
    /// Those of them that were there.
    pub prefix_cache_hits: u64,
}

#[derive(Debug)]
struct Sequence {
    /// Prompt and completion so far.
    num_tokens: u32,
    /// Tokens whose keys and values are in the cache.
    num_computed: u32,
    blocks: Vec<u32>,
    /// The names of its full blocks; `None` if it shares nothing.
    chain: Option<PrefixChain>,
    has_started: bool,
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
            counts: Counts::default(),
        })
    }

    /// Queues a sequence that may grow by `max_tokens`. With a root it shares blocks with others
    /// of the same root; without one it shares nothing.
    ///
    /// # Errors
    /// [`Error::ContextLength`] if it could never fit the cache, [`Error::Overloaded`] if the
    /// queue is full.
    ///
    /// # Panics
    /// If `id` is already known.
    pub fn admit(
        &mut self,
        id: SequenceId,
        prompt: &[u32],
        max_tokens: u32,
        root: Option<PrefixRoot>,
    ) -> Result<()> {
        let newcomer = Newcomer {
            prompt,
            max_tokens,
            root,
        };
        self.admit_all(id, &[newcomer])
    }

    /// Queues sequences that belong together, named from `first` on: all of them or none. Where
    /// nothing waits they are taken however many they are: what is refused then would be refused
    /// for ever.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    ///
    /// # Panics
    /// As [`admit`](Self::admit).
    pub fn admit_all(&mut self, first: SequenceId, newcomers: &[Newcomer<'_>]) -> Result<()> {
        let capacity = self
            .config
            .num_blocks
            .saturating_mul(self.config.block_size);
        let excess = |newcomer: &&Newcomer<'_>| {
            newcomer.num_tokens().saturating_add(newcomer.max_tokens) > capacity
        };
        if let Some(newcomer) = newcomers.iter().find(excess) {
            return Err(Error::ContextLength {
                prompt_tokens: newcomer.num_tokens(),
                max_tokens: newcomer.max_tokens,
                max_model_len: capacity,
            });
        }
        let waiting = self.waiting.iter().map(|id| self.sequences[id].num_tokens);
        let coming = newcomers.iter().map(Newcomer::num_tokens);
        let queued_tokens: u64 = waiting.chain(coming).map(u64::from).sum();
        let too_many = self.waiting.len() + newcomers.len() > self.config.max_queued_requests;
        let too_long = queued_tokens > self.config.max_queued_tokens;
        if (too_many || too_long) && !self.waiting.is_empty() {
            return Err(Error::Overloaded {
                retry_after: std::time::Duration::from_secs(1),
            });
        }
        for (id, newcomer) in (first..).zip(newcomers) {
            let block_size = self.config.block_size;
            let chain = |root| PrefixChain::new(root, block_size, newcomer.prompt);
            let fresh = Sequence {
                num_tokens: newcomer.num_tokens(),
                num_computed: 0,
                blocks: Vec::new(),
                chain: newcomer.root.map(chain),
                has_started: false,
            };
            let known = self.sequences.insert(id, fresh);
            assert!(known.is_none(), "sequence {id} is admitted twice");
            self.waiting.push_back(id);
        }
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

    /// Plans a step for one sequence alone, to find out whether it is the one that fails. Others
    /// give way if their blocks are needed.
    pub fn schedule_only(&mut self, id: SequenceId) -> Step {
        let mut step = Step::default();
        let mut budget = self.config.max_num_batched_tokens;
        if !self.sequences.contains_key(&id) {
            return step;
        }
        if let Some(place) = self.waiting.iter().position(|&other| other == id) {
            self.waiting.remove(place);
            while !self.enter(id, &mut step) {
                let victim = self.preempt_youngest();
                step.preempted
                    .push(victim.expect("an empty cache holds any sequence"));
            }
        } else {
            // The youngest is the last to give way.
            self.running.retain(|&other| other != id);
            self.running.insert(0, id);
            if self.sequences[&id].pending() == 1 && !self.make_room(id, &mut step) {
                return step;
            }
        }
        self.push_slice(id, &mut step, &mut budget);
        step
    }

    /// Forgets every key and value: whatever runs will be computed from the start.
    pub fn restart(&mut self) {
        while let Some(id) = self.running.pop() {
            self.put_back(id);
        }
        self.blocks.forget_names();
    }

    /// Forgets every sequence and every key and value.
    pub fn reset(&mut self) {
        self.blocks = BlockAllocator::new(self.config.num_blocks);
        self.sequences.clear();
        self.waiting.clear();
        self.running.clear();
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
            if !self.enter(id, step) {
                break;
            }
            self.waiting.pop_front();
            self.push_slice(id, step, budget);
        }
    }

    /// Gets a sequence its blocks and a place in the batch. `false` if there are too few.
    fn enter(&mut self, id: SequenceId, step: &mut Step) -> bool {
        let block_size = self.config.block_size;
        let sequence = self.sequences.get_mut(&id).expect("a known sequence");
        let names = sequence.chain.as_ref().map_or(&[][..], PrefixChain::hashes);
        // The last token is always computed: its logits choose the next one.
        let reusable = ((sequence.num_tokens - 1) / block_size) as usize;
        let mut blocks = self.blocks.share(&names[..reusable.min(names.len())]);
        let num_shared = blocks.len();
        let needed = self.config.blocks_for(sequence.num_tokens) - num_shared;
        let Some(fresh) = self.blocks.take(needed) else {
            self.blocks.give_back(blocks);
            return false;
        };
        blocks.extend(fresh);
        sequence.blocks = blocks;
        sequence.num_computed = num_shared as u32 * block_size;
        if !std::mem::replace(&mut sequence.has_started, true) {
            if sequence.chain.is_some() {
                self.counts.prefix_cache_queries += u64::from(sequence.num_tokens);
                self.counts.prefix_cache_hits += u64::from(sequence.num_computed);
            }
            step.started.push((id, sequence.num_computed));
        }
        self.running.push(id);
        true
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
            let victim = self.preempt_youngest().expect("`id` itself is running");
            step.preempted.push(victim);
            if victim == id {
                return false;
            }
        }
    }

    fn preempt_youngest(&mut self) -> Option<SequenceId> {
        let victim = self.running.pop()?;
        self.put_back(victim);
        self.counts.preemptions += 1;
        Some(victim)
    }

    /// To the front of the queue, without blocks.
    fn put_back(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a known sequence");
        sequence.num_computed = 0;
        self.blocks.give_back(std::mem::take(&mut sequence.blocks));
        self.waiting.push_front(id);
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
            let Some(sequence) = self.sequences.get_mut(&slice.id) else {
                continue;
            };
            let before = sequence.num_computed / self.config.block_size;
            sequence.num_computed += slice.len;
            let full = sequence.num_computed / self.config.block_size;
            let Some(chain) = &sequence.chain else {
                continue;
            };
            for index in before as usize..full as usize {
                self.blocks
                    .name(sequence.blocks[index], chain.hashes()[index]);
            }
        }
    }

    /// Notes that a sequence grew by one token.
    pub fn appended(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.num_tokens += 1;
            if let Some(chain) = &mut sequence.chain {
                chain.push(token);
            }
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

    /// What it may spend.
    #[must_use]
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
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

    /// What has happened since the start.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests;
