//! The adapter: pairs of low-rank matrices, all in one flat buffer.

use std::ops::Range;

use candle_core::{DType, Device, TensorId};

use super::config::LoraConfig;
use super::plan::{PairAdapter, Parameter, Plan, Role, Views};
use super::saved::{Saved, SavedModules};
use crate::bridge::{edit_slice, read};
use crate::config::{EMBEDDING, HEAD, ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::layers::Group;
use crate::random::Random;
use crate::tensor::Tensor;
use crate::weights::{Weights, decode};

/// A LoRA adapter: for each adapted linear map `y = x·Wᵀ` the pair that adds `s·(x·Aᵀ)·Bᵀ`; and
/// whole weights that take the place of the base model's, where
/// [`modules_to_save`](LoraConfig::modules_to_save) names some.
///
/// All parameters lie in one buffer, so an optimizer step, a checkpoint or a reduction over
/// workers is one pass over one slice; [`parameters`](Self::parameters) says which range is what.
/// A fresh adapter has `B = 0` and changes nothing.
///
/// # Source
/// Hu et al. 2021, §4.1, <https://arxiv.org/abs/2106.09685>
#[derive(Debug)]
pub struct Adapter {
    config: LoraConfig,
    plan: Plan,
    values: Tensor,
    views: Views,
    /// Its values on a GPU, which are the newer ones once they were changed there: whoever looks at `values` or `views`
    /// settles first.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: std::sync::Mutex<super::there::There>,
}

impl Adapter {
    /// A fresh adapter: `A ~ U(±1/√D_in)`, `B = 0`, as PEFT starts. The numbers depend on the seed
    /// and the parameter's name alone.
    ///
    /// # Errors
    /// As [`LoraConfig::validate`]; [`Error::Config`] if no linear map of the model is targeted, or
    /// if modules are trained whole: those begin as the base's, see [`init_over`](Self::init_over).
    pub fn init(
        config: &LoraConfig,
        model: &ModelConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        if let Some(name) = config.modules_to_save.first() {
            let reason = format!("{name:?} begins as the base's weight: use Adapter::init_over");
            return Err(config_error("modules_to_save", reason));
        }
        Self::random(config, model, seed)?.into_device(device)
    }

    /// [`init`](Self::init) over a base model, whose weights are where the modules that are trained
    /// whole begin.
    ///
    /// # Errors
    /// As [`init`](Self::init), and [`Error::MissingTensor`], [`Error::Shape`] and
    /// [`Error::DType`] for the base's weights; [`Error::Unsupported`] for modules that cannot be
    /// trained whole by themselves.
    pub fn init_over(
        config: &LoraConfig,
        model: &ModelConfig,
        base: &Weights,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut adapter = Self::random(config, model, seed)?;
        for parameter in adapter.plan.parameters.clone() {
            let Role::Saved(name) = &parameter.role else {
                continue;
            };
            let name = match &name[..] {
                HEAD if model.tie_word_embeddings => EMBEDDING,
                name => name,
            };
            let actual = base.shape(name)?.to_vec();
            if actual != parameter.shape {
                return Err(Error::Shape {
                    name: name.to_owned(),
                    expected: parameter.shape,
                    actual,
                });
            }
            let begin = decode::<f32>(name, base.dtype(name)?, &base.bytes(name)?)?;
            adapter.update(|values| values[parameter.range].copy_from_slice(&begin))?;
        }
        adapter.into_device(device)
    }

    /// Random pairs; whole weights are still zero.
    fn random(config: &LoraConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let targets = |projection, layer| config.targets(projection, layer);
        let plan = Plan::new(config, model, targets, SavedModules::new(config, model)?);
        if plan.parameters.is_empty() {
            let reason = "no linear map of the model is named".to_owned();
            return Err(config_error("target_modules", reason));
        }
        let mut values = vec![0.0_f32; plan.len()];
        for parameter in plan.parameters.iter().filter(|parameter| parameter.is_a()) {
            let bound = 1.0 / (parameter.shape[1] as f64).sqrt();
            let mut random = Random::new(seed, &parameter.name);
            values[parameter.range.clone()].fill_with(|| random.uniform(-bound, bound) as f32);
        }
        let values = candle_core::Tensor::from_vec(values, plan.len(), &Device::Cpu)?;
        Self::from_values(config.clone(), plan, values)
    }

    fn into_device(self, device: &Device) -> Result<Self> {
        let values = self.values.host()?.to_device(device)?;
        Self::from_values(self.config, self.plan, values)
    }

    /// An adapter of given values; `fill` is called with each parameter and its place.
    pub(crate) fn from_parameters(
        config: LoraConfig,
        model: &ModelConfig,
        targets: impl Fn(Projection, usize) -> bool,
        saved: SavedModules,
        mut fill: impl FnMut(&Parameter, &mut [f32]) -> Result<()>,
    ) -> Result<Self> {
        let plan = Plan::new(&config, model, targets, saved);
        let mut values = vec![0.0_f32; plan.len()];
        for parameter in &plan.parameters {
            fill(parameter, &mut values[parameter.range.clone()])?;
        }
        let values = candle_core::Tensor::from_vec(values, plan.len(), &Device::Cpu)?;
        Self::from_values(config, plan, values)
    }

    fn from_values(config: LoraConfig, plan: Plan, values: candle_core::Tensor) -> Result<Self> {
        let values = Tensor::from(values);
        let views = plan.views(&values)?;
        Ok(Self {
            config,
            plan,
            values,
            views,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there: std::sync::Mutex::default(),
        })
    }

    /// The settings it was made from.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Its parameters in the order of the flat buffer.
    pub fn parameters(&self) -> &[Parameter] {
        &self.plan.parameters
    }

    /// How many numbers it holds.
    pub fn num_parameters(&self) -> usize {
        self.plan.len()
    }

    /// Its number type: F32 unless converted.
    pub fn dtype(&self) -> DType {
        self.values.dtype()
    }

    /// A copy of the flat buffer, as f32.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn values(&self) -> Result<Vec<f32>> {
        self.settle()?;
        Ok(self.values.host()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Calls `look` with the flat buffer as f32: where it lies, or a copy where it is another number
    /// type or on another device.
    ///
    /// # Errors
    /// [`Error::Candle`] if the device fails.
    pub fn with<R>(&self, look: impl FnOnce(&[f32]) -> R) -> Result<R> {
        self.settle()?;
        match self.is_plain() {
            true => Ok(look(read::<f32>(&self.values)?.slice())),
            false => Ok(look(&self.values()?)),
        }
    }

    /// Whether [`with`](Self::with) copies nothing.
    pub(crate) fn is_plain(&self) -> bool {
        let on_cpu = |values: &candle_core::Tensor| values.device().is_cpu();
        self.dtype() == DType::F32 && self.values.host().is_ok_and(on_cpu)
    }

    /// Changes the flat buffer in place: an optimizer step, or a checkpoint coming back.
    ///
    /// # Errors
    /// [`Error::Device`] off the CPU, [`Error::Candle`] if the adapter is not F32.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.settle()?;
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            self.there = std::sync::Mutex::default();
        }
        edit_slice(&self.values, change)
    }

    /// [`update`](Self::update) in a GPU's memory, where the values stay: the host's become current when somebody looks
    /// at them.
    ///
    /// # Errors
    /// [`Error::Candle`] if the adapter is not F32; [`Error::Gpu`] if the GPU fails.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn update_on_gpu<R>(
        &mut self,
        gpu: &updraft_kernels::cuda::Gpu,
        change: impl FnOnce(updraft_kernels::cuda::ViewMut<'_, f32>) -> R,
    ) -> Result<R> {
        read::<f32>(&self.values)?; // the type
        let mut there = self.newest_for(gpu)?;
        let mut values = there.change(self.values.host()?, gpu)?.write::<f32>();
        Ok(change(values.view()))
    }

    /// Makes the host's values current, if they changed on a GPU.
    fn settle(&self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        self.settle_from(&mut self.there())?;
        Ok(())
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn there(&self) -> std::sync::MutexGuard<'_, super::there::There> {
        let there = self.there.lock();
        there.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn settle_from(&self, there: &mut super::there::There) -> Result<()> {
        match there.take_newer()? {
            Some(newer) => edit_slice(&self.values, |values: &mut [f32]| {
                values.copy_from_slice(&newer);
            }),
            None => Ok(()),
        }
    }

    /// What is on a GPU, when either that or the host has the newest values.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn newest_for(
        &self,
        gpu: &updraft_kernels::cuda::Gpu,
    ) -> Result<std::sync::MutexGuard<'_, super::there::There>> {
        let mut there = self.there();
        if !there.has_master_on(gpu) {
            self.settle_from(&mut there)?;
        }
        Ok(there)
    }

    /// The same adapter in another number type, or with its own memory in the same one.
    ///
    /// # Errors
    /// [`Error::Candle`] if candle cannot convert.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.settle()?;
        let values = if dtype == self.dtype() {
            self.values.host()?.copy()?
        } else {
            self.values.host()?.to_dtype(dtype)?
        };
        Self::from_values(self.config.clone(), self.plan.clone(), values)
    }

    /// Checks that it fits a model.
    ///
    /// # Errors
    /// [`Error::Adapter`] with the first shape that differs.
    pub fn check(&self, model: &ModelConfig) -> Result<()> {
        let mut weights = model.tensors();
        if model.tie_word_embeddings {
            let table = vec![model.vocab_size, model.hidden_size];
            weights.push((HEAD.to_owned(), table));
        }
        let mut parameters = self.plan.parameters.iter();
        parameters.try_for_each(|parameter| parameter.check(model, &weights))
    }

    /// Whether some weights of the base model are trained whole. Only a decoder made by
    /// [`Decoder::with_saved_modules`](crate::Decoder::with_saved_modules) runs it.
    pub fn saves_modules(&self) -> bool {
        !self.views.saved.is_empty()
    }

    /// Whether nothing but whole weights is trained: a model rather than an adapter of one.
    pub fn is_whole(&self) -> bool {
        let mut parameters = self.plan.parameters.iter();
        parameters.all(|parameter| matches!(parameter.role, Role::Saved(_)))
    }

    /// Whether a model whose head is its embedding has one of its own with this adapter.
    pub fn unties_head(&self, model: &ModelConfig) -> bool {
        let saved = &self.views.saved;
        let one_of_both = saved.get(EMBEDDING).is_some() || saved.get(HEAD).is_some();
        model.tie_word_embeddings && one_of_both && !self.plan.tied_head()
    }

    pub(crate) fn views(&self) -> Result<&Views> {
        self.settle()?;
        Ok(&self.views)
    }

    /// Its values on a GPU in some type, made once for each change of them.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn on_gpu(
        &self,
        gpu: &updraft_kernels::cuda::Gpu,
        dtype: DType,
    ) -> Result<std::sync::Arc<Views>> {
        let mut there = self.newest_for(gpu)?;
        there.views(&self.plan, self.values.host()?, gpu, dtype)
    }

    /// Which flat buffer it is a view of.
    pub(crate) fn id(&self) -> TensorId {
        self.values
            .host()
            .expect("an adapter has the host's memory")
            .id()
    }

    pub(crate) fn saved(&self) -> Result<&Saved> {
        Ok(&self.views()?.saved)
    }

    /// Some of the flat buffer.
    pub(super) fn part(&self, range: &Range<usize>) -> Result<Vec<f32>> {
        self.settle()?;
        let part = self.values.narrow(0, range.start, range.len())?;
        Ok(part.host()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The pair of one linear map, `A` as its own view.
    pub(crate) fn pair(
        &self,
        projection: Projection,
        layer: usize,
    ) -> Result<Option<(Tensor, &PairAdapter)>> {
        let group = self
            .views()?
            .layer(layer)
            .and_then(|groups| groups[Group::of(projection) as usize].as_ref());
        let pair = group.and_then(|group| {
            let pair = group
                .pairs
                .iter()
                .find(|pair| pair.projection == projection)?;
            Some((group, pair))
        });
        match pair {
            Some((group, pair)) => Ok(Some((
                group.a.narrow(0, pair.ranks.start, pair.ranks.len())?,
                pair,
            ))),
            None => Ok(None),
        }
    }
}

fn config_error(field: &str, reason: String) -> Error {
    Error::Config {
        file: "adapter_config.json",
        field: field.to_owned(),
        reason,
    }
}
