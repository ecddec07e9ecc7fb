//! Loss and gradients on a GPU: the adapter goes there once for each change, its gradients add up there.

use updraft_kernels::cuda::Gpu;

use crate::batch::Part;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::layers::{Dropout, Trained};
use crate::lora::{Adapter, Gradients};
use crate::training::Activations;

impl Decoder {
    /// [`loss_and_backward`](Self::loss_and_backward) on a GPU, part after part; everything is checked.
    pub(crate) fn backward_on_gpu(
        &self,
        gpu: &Gpu,
        parts: &[Part],
        adapter: &Adapter,
        denom: f64,
        gradients: &mut Gradients,
        activations: Activations,
    ) -> Result<f64> {
        let views = adapter.on_gpu(gpu, self.dtype())?;
        let sums = gradients.on_gpu(gpu)?;
        let ops = self.ops();
        let blocks = self.hold_with(&ops, adapter, Some(&views))?;
        let p = adapter.config().lora_dropout;
        let mut total = 0.0;
        for part in parts.iter().filter(|part| !part.labels.is_empty()) {
            let keys = self.keys(part, p)?;
            let trained = Trained {
                adapter: &views,
                gradients: &sums,
                dropout: keys.as_ref().map(|keys| Dropout { p, keys }),
            };
            total += self.backward(&blocks, &ops, part, denom, trained, activations)?;
        }
        Ok(total)
    }
}
