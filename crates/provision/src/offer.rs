//! What a provider can rent out.

use serde::{Deserialize, Serialize};

use crate::resources::Accelerator;

/// One kind of machine in one place, with its price.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The provider that makes it.
    pub provider: String,
    /// The provider's name of the machine type.
    pub instance_type: String,
    /// Where it stands.
    pub region: String,
    /// The zone in the region, where the provider has zones.
    pub zone: Option<String>,
    /// Virtual CPUs.
    pub cpus: f64,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// Its free disk in GiB, where that is as it is; `None` where a disk is made as large as it is asked for.
    #[serde(default)]
    pub disk_gib: Option<f64>,
    /// The accelerators it carries.
    pub accelerator: Option<Accelerator>,
    /// Whether the provider may take it away at any time.
    pub spot: bool,
    /// The price; zero for machines one already has.
    pub usd_per_hour: f64,
}
