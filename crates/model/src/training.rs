//! Loss and gradients: the backward pass through the decoder, part by part.

use updraft_kernels::Threads;

use crate::batch::Part;
use crate::blocks::Held;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::indices::RowKeys;
use crate::layers::{AdapterRows, Dropout, SavedBlock, Stream, Trained};
use crate::lora::{Adapter, Gradients, Views};
use crate::ops::{Ops, Rows};

/// What the backward pass finds when it arrives at a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// Everything it needs: the fastest, and the most memory.
    #[default]
    Stored,
    /// The block's input only; the block is run again. The same numbers for a third more work and
    /// a fraction of the memory. Also called gradient checkpointing.
    Recomputed,
}

impl Decoder {
    /// The summed cross-entropy of the labels of all parts, without gradients.
    ///
    /// # Errors
    /// As [`loss_and_backward`](Self::loss_and_backward).
    pub fn loss(&self, parts: &[Part], adapter: Option<&Adapter>) -> Result<f64> {
        if let Some(adapter) = adapter.filter(|adapter| !self.has_modules_of(adapter)) {
            return self.with_saved_modules(adapter)?.loss(parts, Some(adapter));
        }
        self.check_parts(parts, adapter)?;
        let placed = adapter.map(|adapter| self.placed(adapter)).transpose()?;
        let placed = placed.flatten();
        let ops = self.ops();
        let blocks = match adapter {
            Some(adapter) => self.hold_with(&ops, adapter, placed.as_ref())?,
            None => self.hold(),
        };
        let views = match (&placed, adapter) {
            (Some(placed), _) => Some(&**placed),
            (None, adapter) => adapter.map(Adapter::views).transpose()?,
        };
        let losses = self.each_job(
            parts,
            |_| Ok(()),
            |ops, part, ()| {
                let adapters = views.map(|adapter| whole(adapter, part));
                let pass = self.pass(&blocks, ops, &part.batch)?;
                let stream = self.run(&blocks, &pass, adapters.as_slice(), None, |_| {})?;
                let mut rows = stream.rows(ops, &pass.logit_rows)?;
                let hidden = self.norm.forward(ops, &mut rows, 0)?.0;
                ops.cross_entropy(&hidden, &self.head, &part.labels)
            },
        )?;
        Ok(losses.into_iter().map(|(loss, ())| loss).sum())
    }

    /// The summed cross-entropy of the labels of all parts; adds the gradients of `sum / denom` by
    /// the adapter's parameters to `gradients`. Base weights are frozen and get none, but for
    /// those the adapter holds whole, which stand in for the base's here.
    ///
    /// `denom` is the number of labels in the whole optimizer step, over all micro-batches and
    /// workers, which makes accumulation exact.
    ///
    /// Two or more parts run side by side on the decoder's threads, each on one of them, and their
    /// gradients are added in the order of the parts; a single part uses all threads inside its
    /// operations. Bits therefore depend on how a batch is cut into parts, and on nothing else.
    ///
    /// # Errors
    /// [`Error::Batch`] if a part contradicts itself or the model, no token of any part is to be
    /// learned, or `denom` is not positive; [`Error::Adapter`] if adapter or gradients do not fit.
    pub fn loss_and_backward(
        &self,
        parts: &[Part],
        adapter: &Adapter,
        denom: f64,
        gradients: &mut Gradients,
        activations: Activations,
    ) -> Result<f64> {
        if !self.has_modules_of(adapter) {
            return self.with_saved_modules(adapter)?.loss_and_backward(
                parts,
                adapter,
                denom,
                gradients,
                activations,
            );
        }
        self.check_parts(parts, Some(adapter))?;
        parts
            .iter()
            .try_for_each(|part| check_seeds(part, adapter))?;
        if !(denom.is_finite() && denom > 0.0) {
            return Err(Error::batch(format!("a loss divided by {denom}")));
        }
        if !gradients.belong_to(adapter) {
            return Err(Error::adapter("gradients of another adapter"));
        }
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = self.gpu() {
            return self.backward_on_gpu(gpu, parts, adapter, denom, gradients, activations);
        }
        let own = |job: usize| {
            if job == 0 {
                Ok(None)
            } else {
                gradients.zeros_like().map(Some)
            }
        };
        let (p, blocks) = (adapter.config().lora_dropout, self.hold());
        let views = adapter.views()?;
        let jobs = self.each_job(parts, own, |ops, part, own| {
            let keys = self.keys(part, p)?;
            let trained = Trained {
                adapter: views,
                gradients: own.as_ref().unwrap_or(gradients).views(),
                dropout: keys.as_ref().map(|keys| Dropout { p, keys }),
            };
            self.backward(&blocks, ops, part, denom, trained, activations)
        })?;
        let mut total = 0.0;
        for (loss, own) in jobs {
            total += loss;
            if let Some(own) = own {
                gradients.add(&own)?;
            }
        }
        Ok(total)
    }

    pub(crate) fn backward(
        &self,
        blocks: &Held<'_>,
        ops: &Ops,
        part: &Part,
        denom: f64,
        trained: Trained<'_>,
        activations: Activations,
    ) -> Result<f64> {
        let adapters = [AdapterRows {
            dropout: trained.dropout,
            ..whole(trained.adapter, part)
        }];
        let pass = self.pass(blocks, ops, &part.batch)?;
        let embedded = self.embedding.forward(&pass)?;
        if part.neftune_noise_alpha > 0.0 {
            ops.add_uniform(&part.row_keys(), &self.neftune_magnitudes(part), &embedded)?;
        }
        let mut saved = Vec::with_capacity(self.config.num_hidden_layers);
        let stream = self.run_embedded(blocks, &pass, embedded, &adapters, None, |block| {
            saved.push(match activations {
                Activations::Stored => Saved::All(Box::new(block)),
                Activations::Recomputed => Saved::Input(block.into_input()),
            });
        })?;
        let rows = &pass.logit_rows;
        let (hidden, saved_norm) = self.norm.forward(ops, &mut stream.rows(ops, rows)?, 0)?;
        drop(stream);
        let (loss, dhidden) = ops.cross_entropy_backward(
            &hidden,
            &self.head,
            &part.labels,
            denom,
            trained.gradients.saved.head(),
        )?;
        let drows = dhidden.zeros_like()?;
        self.norm
            .backward(ops, &saved_norm, &dhidden, &drows, trained)?;
        let rooms = blocks.iter().map(|block| block.gradient_room(&pass));
        let room = rooms.max().unwrap_or(0);
        let dstream = ops.scatter(&drows, rows, part.batch.num_tokens(), room)?;
        for (block, saved) in blocks.iter().zip(saved).rev() {
            let saved = match saved {
                Saved::All(saved) => *saved,
                Saved::Input(sum) => {
                    block.forward(&pass, &mut Stream { sum, delta: None }, &adapters, None)?
                }
            };
            block.backward(&pass, saved, &dstream, trained)?;
        }
        self.embedding.backward(&pass, &dstream, trained)?;
        Ok(loss)
    }

    /// The operations of a training pass, on all threads.
    pub(crate) fn ops(&self) -> Ops {
        Ops {
            threads: self.threads().clone(),
            rows: Rows::Together,
        }
    }

    /// What dropout draws from, where the weights are; none if nothing is dropped.
    pub(crate) fn keys(&self, part: &Part, p: f64) -> Result<Option<RowKeys>> {
        let keys = || RowKeys::beside(&self.head, part.row_keys());
        (p > 0.0).then(keys).transpose()
    }

    /// How far the noise on each token's embedding goes, `[T]`.
    fn neftune_magnitudes(&self, part: &Part) -> Vec<f64> {
        let lengths =
            (0..part.batch.num_sequences()).map(|document| part.batch.rows(document).len());
        let magnitudes = lengths.flat_map(|length| {
            let numbers = (length * self.config.hidden_size) as f64;
            std::iter::repeat_n(part.neftune_noise_alpha / numbers.sqrt(), length)
        });
        magnitudes.collect()
    }

    /// Cuts the parts into at most one job per thread and runs `part` on each; the sum and state of each
    /// job come back in order.
    fn each_job<S: Send>(
        &self,
        parts: &[Part],
        state: impl Fn(usize) -> Result<S>,
        part: impl Fn(&Ops, &Part, &mut S) -> Result<f64> + Sync,
    ) -> Result<Vec<(f64, S)>> {
        let num_jobs = parts.len().min(self.threads().num_threads()).max(1);
        let mut jobs = (0..num_jobs)
            .map(|job| {
                let parts =
                    &parts[parts.len() * job / num_jobs..parts.len() * (job + 1) / num_jobs];
                Ok(Job {
                    parts,
                    state: state(job)?,
                    loss: Ok(0.0),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut ops = self.ops();
        if num_jobs > 1 {
            ops.threads = Threads::single();
        }
        let one = |one: &Part, state: &mut S| match one.labels[..] {
            [] => Ok(0.0),
            _ => part(&ops, one, state),
        };
        let run = |jobs: &mut [Job<'_, S>]| {
            for job in jobs {
                job.loss = job.parts.iter().map(|part| one(part, &mut job.state)).sum();
            }
        };
        self.threads()
            .install(|| self.threads().split(jobs.as_mut_slice(), 1, run));
        jobs.into_iter()
            .map(|job| Ok((job.loss?, job.state)))
            .collect()
    }

    fn check_parts(&self, parts: &[Part], adapter: Option<&Adapter>) -> Result<()> {
        parts.iter().try_for_each(|part| self.check_part(part))?;
        if parts.iter().all(|part| part.labels.is_empty()) {
            return Err(Error::batch("no token is to be learned"));
        }
        adapter.map_or(Ok(()), |adapter| self.check_adapter(adapter))
    }

    fn check_part(&self, part: &Part) -> Result<()> {
        part.batch.validate(&self.config, 0)?;
        let (labels, rows) = (part.labels.len(), part.batch.logit_rows.len());
        if labels != rows {
            return Err(Error::batch(format!(
                "{labels} labels for {rows} logit rows"
            )));
        }
        let vocab_size = self.config.vocab_size;
        if let Some(label) = part
            .labels
            .iter()
            .find(|&&label| label as usize >= vocab_size)
        {
            return Err(Error::batch(format!(
                "label {label} is outside the vocabulary of {vocab_size}"
            )));
        }
        match part.batch.kv {
            Some(_) => Err(Error::batch("training reads no pages")),
            None => Ok(()),
        }
    }
}

/// What was kept of a block's forward pass.
enum Saved {
    All(Box<SavedBlock>),
    Input(crate::tensor::Tensor),
}

/// Parts that one thread works through, and what comes of them.
struct Job<'a, S> {
    parts: &'a [Part],
    state: S,
    loss: Result<f64>,
}

fn whole<'a>(adapter: &'a Views, part: &Part) -> AdapterRows<'a> {
    AdapterRows {
        adapter,
        rows: 0..part.batch.num_tokens(),
        dropout: None,
    }
}

/// What is drawn at random needs a seed for each document.
fn check_seeds(part: &Part, adapter: &Adapter) -> Result<()> {
    let random = adapter.config().lora_dropout > 0.0 || part.neftune_noise_alpha > 0.0;
    let (seeds, documents) = (part.seeds.len(), part.batch.num_sequences());
    if random && seeds != documents {
        return Err(Error::batch(format!(
            "{seeds} seeds for {documents} documents, and dropout or noise is on"
        )));
    }
    Ok(())
}
