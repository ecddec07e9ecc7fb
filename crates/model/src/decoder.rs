//! The decoder: one forward pass for training, prefill and decode.

use std::sync::Arc;

use candle_core::{DType, Device, TensorId};
use updraft_kernels::Threads;

use crate::batch::Batch;
use crate::blocks::{Blocks, Held};
use crate::bridge::RopeTable;
use crate::config::{HEAD, ModelConfig};
use crate::error::{Error, Result};
use crate::hidden::{Hidden, Logits};
use crate::indices::{Indices, SeqStarts};
use crate::kv_pages::{KvPages, Places};
use crate::layers::{
    AdapterRows, Block, Embedding, Loader, Matrices, Pass, Place, RmsNorm, SavedBlock, Stream,
};
use crate::lora::{Adapter, Views};
use crate::ops::{Ops, Rows, check_device, new_rope_table};
use crate::quantized::Quantization;
use crate::tensor::Tensor;
use crate::weights::Weights;

/// A decoder-only language model, ready to run.
///
/// No call depends on the calls before: pages belong to the caller, adapters are passed in, and any
/// number of threads may use one decoder at once. On a GPU the adapter trained last stays in memory
/// behind the weights; steps with different ones take turns.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) config: ModelConfig,
    dtype: DType,
    threads: Threads,
    rope: Arc<RopeTable>,
    pub(crate) embedding: Embedding,
    blocks: Arc<Blocks>,
    pub(crate) norm: RmsNorm,
    /// `[V, C]`
    pub(crate) head: Tensor,
    /// The adapter some of whose weights took the place of the model's.
    saved_of: Option<TensorId>,
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    gpu: Option<updraft_kernels::cuda::Gpu>,
}

/// What a process holds on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// What it can hold: what is free there, and what it holds already.
    pub available_bytes: u64,
    /// What it holds now, the driver's own not counted.
    pub held_bytes: u64,
    /// The most it has held at once.
    pub peak_bytes: u64,
}

impl Decoder {
    /// Loads a model's weights, converted to `dtype`: [`DType::F32`], or [`DType::F64`] to check
    /// gradients. With [`DType::BF16`] the matrices are kept in bf16, at half the memory, and
    /// everything else is f32. With pages, and where the matrices were stored in bf16, the bits
    /// are those of `F32`; without pages, as in training, what is multiplied with them is rounded
    /// to bf16 too.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Shape`] and [`Error::DType`] name the tensor;
    /// [`Error::Device`] and [`Error::Unsupported`] say what there are no kernels for.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self> {
        let (dtype, matrices) = match dtype {
            DType::BF16 => (DType::F32, Matrices::Bf16),
            other => (other, Matrices::Computed),
        };
        Self::load_as(config, weights, dtype, matrices, device, threads)
    }

    /// Loads a model's weights to serve them, the matrices quantized as they are read; everything
    /// else is f32. With pages, the bits are those of a decoder in f32 with the matrices that the
    /// quantized ones stand for. It cannot be trained on. A matrix whose rows cannot be cut into
    /// whole blocks is kept in bf16.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_quantized(
        config: &ModelConfig,
        weights: &Weights,
        Quantization::Q8_0: Quantization,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self> {
        Self::load_as(config, weights, DType::F32, Matrices::Q8_0, device, threads)
    }

    fn load_as(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        matrices: Matrices,
        device: &Device,
        threads: &Threads,
    ) -> Result<Self> {
        check_device(device)?;
        let rope = new_rope_table(config, dtype)?;
        let loader = Loader {
            config,
            weights,
            dtype,
            matrices,
            place: Place::Host(device),
        };
        Self::load_from(loader, rope, threads)
    }

    /// Loads a model's weights into a GPU's memory, to train an adapter or to decode there: activations,
    /// frozen weights, pages and products are of `dtype`, [`DType::BF16`], [`DType::F16`] or
    /// [`DType::F32`], sums, logits and the adapter are f32. It cannot be one of
    /// [`with_saved_modules`](Self::with_saved_modules).
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Error::Gpu`].
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn load_on_gpu(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        gpu: &updraft_kernels::cuda::Gpu,
        threads: &Threads,
    ) -> Result<Self> {
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let table = updraft_kernels::rope::Table::new(&frequencies, config.max_len(), 1.0);
        let table = updraft_kernels::cuda::rope::Table::new(gpu, &table)?;
        let loader = Loader {
            config,
            weights,
            dtype,
            matrices: Matrices::Computed,
            place: Place::Gpu(gpu),
        };
        Self::load_from(loader, RopeTable::Gpu(table), threads)
    }

    fn load_from(loader: Loader<'_>, rope: RopeTable, threads: &Threads) -> Result<Self> {
        let config = loader.config;
        config.validate()?;
        let embedding = Embedding::load(loader)?;
        let head = if config.tie_word_embeddings {
            embedding.weight.clone()
        } else {
            loader.matrix(HEAD, [config.vocab_size, config.hidden_size])?
        };
        Ok(Self {
            config: config.clone(),
            dtype: loader.dtype,
            threads: threads.clone(),
            rope: Arc::new(rope),
            embedding,
            blocks: Arc::new(Blocks::load(loader, threads)?),
            norm: RmsNorm::load(loader, "model.norm.weight", config.hidden_size)?,
            head,
            saved_of: None,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            gpu: match loader.place {
                Place::Gpu(gpu) => Some(gpu.clone()),
                Place::Host(_) => None,
            },
        })
    }

    /// The decoder that an adapter with [`modules_to_save`](crate::LoraConfig::modules_to_save) is
    /// part of: the adapter's weights in place of this one's, everything else shared. They are
    /// seen through, not copied, so it follows the adapter's training. Without such modules it is
    /// this decoder once more.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the adapter is for another model.
    pub fn with_saved_modules(&self, adapter: &Adapter) -> Result<Self> {
        self.check_fit(adapter)?;
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if self.gpu.is_some() && adapter.saves_modules() {
            return Err(crate::gpu::host_only());
        }
        let saved = adapter.saved()?;
        Ok(Self {
            config: self.config.clone(),
            dtype: self.dtype,
            threads: self.threads.clone(),
            rope: self.rope.clone(),
            embedding: self.embedding.with_saved(saved),
            blocks: match adapter.saves_modules() {
                true => Arc::new(self.blocks.with_saved(saved)),
                false => self.blocks.clone(),
            },
            norm: self.norm.with_saved(saved),
            head: saved.head().unwrap_or(&self.head).clone(),
            saved_of: adapter.saves_modules().then(|| adapter.id()),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            gpu: self.gpu.clone(),
        })
    }

    /// The model of the GPU that it computes on, if on one: bits are those of such a GPU.
    pub fn gpu_name(&self) -> Option<String> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = &self.gpu {
            return Some(gpu.name().unwrap_or_else(|_| "unknown".to_owned()));
        }
        None
    }

    /// The bytes that this process can hold on the GPU it computes on, and the most it has held so far.
    pub fn gpu_memory(&self) -> Option<GpuMemory> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = &self.gpu {
            let figures = || -> updraft_kernels::cuda::Result<GpuMemory> {
                Ok(GpuMemory {
                    available_bytes: gpu.available_bytes()?,
                    held_bytes: gpu.held_bytes()?,
                    peak_bytes: gpu.peak_bytes()?,
                })
            };
            return figures().ok();
        }
        None
    }

    /// How many parts of a micro-batch it computes side by side: one for each thread, and on a GPU all rows as one.
    pub fn num_parts(&self) -> usize {
        match self.is_on_gpu() {
            true => 1,
            false => self.threads.num_threads(),
        }
    }

    /// Whether it computes on a GPU.
    pub fn is_on_gpu(&self) -> bool {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if self.gpu.is_some() {
            return true;
        }
        false
    }

    /// Zeros in its number type, where it computes.
    pub(crate) fn zeros(&self, dims: &[usize]) -> Result<Tensor> {
        self.norm.weight().zeros(dims)
    }

    /// The GPU it lies on, if on one.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn gpu(&self) -> Option<&updraft_kernels::cuda::Gpu> {
        self.gpu.as_ref()
    }

    /// An adapter where this decoder's weights lie; `None` where that is where it lies already.
    pub(crate) fn placed(&self, adapter: &Adapter) -> Result<Option<Arc<Views>>> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = &self.gpu {
            return adapter.on_gpu(gpu, self.dtype).map(Some);
        }
        let _ = adapter;
        Ok(None)
    }

    /// The number type of the adapters that run on it.
    fn adapter_dtype(&self) -> DType {
        match self.is_on_gpu() {
            true => DType::F32,
            false => self.dtype,
        }
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The number type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The threads it runs on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Runs a batch and returns the final, normed hidden state of its `logit_rows`, `[N, C]`.
    ///
    /// On a GPU the states stay there.
    ///
    /// Without pages every sequence is complete in the batch. With pages (`kv` here and in the
    /// batch), new keys and values are written to them and earlier ones read from them, and each
    /// row's bits depend on its own sequence alone: not on the company in the batch, nor on how a
    /// prompt was cut into chunks.
    ///
    /// `batch.adapters` chooses from `adapters` for each sequence.
    ///
    /// # Errors
    /// [`Error::Batch`] if the batch contradicts itself, the model or the pages;
    /// [`Error::Adapter`] if an adapter is for another model.
    pub fn forward(
        &self,
        batch: &Batch,
        adapters: &[&Adapter],
        kv: Option<&mut KvPages>,
    ) -> Result<Hidden> {
        batch.validate(&self.config, adapters.len())?;
        adapters
            .iter()
            .try_for_each(|adapter| self.check_adapter(adapter))?;
        let rows = if kv.is_some() {
            Rows::Apart
        } else {
            Rows::Together
        };
        let ops = Ops {
            threads: self.threads.clone(),
            rows,
        };
        let blocks = self.hold(); // and never in a pool's thread, which may have another pass to run meanwhile
        self.threads.install(|| {
            let placed = adapters.iter().map(|adapter| self.placed(adapter));
            let placed = placed.collect::<Result<Vec<_>>>()?;
            let views = adapters.iter().zip(&placed);
            let views = views.map(|(adapter, placed)| match placed {
                Some(placed) => Ok(&**placed),
                None => adapter.views(),
            });
            let views = views.collect::<Result<Vec<&Views>>>()?;
            let pass = self.pass(&blocks, &ops, batch)?;
            let adapters = AdapterRows::of_batch(batch, &views);
            let stream = self.run(&blocks, &pass, &adapters, kv, |_| {})?;
            let mut stream = stream.rows(&ops, &pass.logit_rows)?;
            Ok(Hidden(self.norm.forward(&ops, &mut stream, 0)?.0))
        })
    }

    /// The logits of hidden states, `[N, C]` → `[N, V]`; on the CPU each row's bits depend on that row alone.
    ///
    /// # Errors
    /// [`Error::Batch`] if `hidden` is not of this model's width, [`Error::Candle`] if it is of another number type.
    pub fn logits(&self, hidden: &Hidden) -> Result<Logits> {
        if hidden.num_cols() != self.config.hidden_size {
            let (hidden, width) = (hidden.num_cols(), self.config.hidden_size);
            return Err(Error::batch(format!(
                "hidden states of width {hidden}, the model's is {width}"
            )));
        }
        let ops = Ops {
            threads: self.threads.clone(),
            rows: Rows::Apart,
        };
        Ok(Logits(ops.logits(&hidden.0, &self.head)?))
    }

    /// The stream after the last block, before the final norm; hands each block's [`SavedBlock`] to `save`.
    pub(crate) fn run(
        &self,
        blocks: &[Block],
        pass: &Pass<'_>,
        adapters: &[AdapterRows<'_>],
        kv: Option<&mut KvPages>,
        save: impl FnMut(SavedBlock),
    ) -> Result<Stream> {
        let embedded = self.embedding.forward(pass)?;
        self.run_embedded(blocks, pass, embedded, adapters, kv, save)
    }

    /// [`run`](Self::run) from the embeddings on, `[T, C]`.
    pub(crate) fn run_embedded(
        &self,
        blocks: &[Block],
        pass: &Pass<'_>,
        embedded: Tensor,
        adapters: &[AdapterRows<'_>],
        mut kv: Option<&mut KvPages>,
        mut save: impl FnMut(SavedBlock),
    ) -> Result<Stream> {
        let places = self.places(pass.batch, kv.as_deref())?;
        let mut stream = Stream {
            sum: embedded,
            delta: None,
        };
        for (layer, block) in blocks.iter().enumerate() {
            let pages = places
                .as_ref()
                .zip(kv.as_deref_mut().map(|kv| &mut kv.layers[layer]));
            save(block.forward(pass, &mut stream, adapters, pages)?);
        }
        Ok(stream)
    }

    /// What a pass of this batch looks things up by goes to where the weights are, once.
    pub(crate) fn pass<'a>(
        &'a self,
        blocks: &'a Held<'_>,
        ops: &'a Ops,
        batch: &'a Batch,
    ) -> Result<Pass<'a>> {
        let indices = |host: &'a [u32]| Indices::beside(&self.head, host);
        let seq_starts = match batch.kv {
            None => SeqStarts::beside(&self.head, &batch.seq_starts)?,
            Some(_) => SeqStarts::on_host(&batch.seq_starts), // attention goes by the tables
        };
        Ok(Pass {
            ops,
            config: &self.config,
            rope: &self.rope,
            batch,
            ids: indices(&batch.ids)?,
            positions: indices(&batch.positions)?,
            seq_starts,
            logit_rows: indices(&batch.logit_rows)?,
            bordered: blocks.bordered(),
        })
    }

    /// The blocks for a pass all of whose rows have one adapter: on a GPU it is in the borders of the weights, unless it
    /// has dropout, which makes the input of each map another one's.
    pub(crate) fn hold_with(
        &self,
        ops: &Ops,
        adapter: &Adapter,
        placed: Option<&Arc<Views>>,
    ) -> Result<Held<'_>> {
        match placed {
            Some(views) if adapter.config().lora_dropout == 0.0 => {
                self.blocks.hold_with(ops, views)
            }
            _ => Ok(self.blocks.hold()),
        }
    }

    /// The blocks for any other pass.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.blocks.hold()
    }

    /// Checks that an adapter can be run here.
    pub(crate) fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        if !self.has_modules_of(adapter) {
            return Err(Error::adapter(
                "it holds whole modules (modules_to_save): run it on Decoder::with_saved_modules, \
                 or merge it",
            ));
        }
        self.check_fit(adapter)
    }

    /// Whether an adapter's whole modules, if it has any, stand here already.
    pub(crate) fn has_modules_of(&self, adapter: &Adapter) -> bool {
        !adapter.saves_modules() || self.saved_of == Some(adapter.id())
    }

    fn check_fit(&self, adapter: &Adapter) -> Result<()> {
        if adapter.dtype() != self.adapter_dtype() {
            let (adapter, own) = (adapter.dtype(), self.adapter_dtype());
            return Err(Error::adapter(format!(
                "it is {adapter:?} where the decoder computes in {own:?}"
            )));
        }
        adapter.check(&self.config)
    }

    fn places<'a>(&self, batch: &'a Batch, kv: Option<&KvPages>) -> Result<Option<Places<'a>>> {
        match (&batch.kv, kv) {
            (None, None) => Ok(None),
            (Some(tables), Some(kv)) if tables.block_size == kv.block_size() => {
                if kv.layers.len() != self.config.num_hidden_layers || kv.dtype() != self.dtype {
                    return Err(Error::batch("pages made for another model"));
                }
                Places::new(batch, tables, kv).map(Some)
            }
            (Some(tables), Some(kv)) => {
                let (tables, pages) = (tables.block_size, kv.block_size());
                Err(Error::batch(format!(
                    "block tables of {tables} tokens for pages of {pages}"
                )))
            }
            _ => Err(Error::batch(
                "block tables need pages, and pages block tables",
            )),
        }
    }
}
