//! What a task needs of a node.

mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What a task needs of a node; the default needs nothing in particular.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    /// The provider to use; any when `None`.
    pub cloud: Option<String>,
    /// The region to use; any when `None`.
    pub region: Option<String>,
    /// The zone to use; any when `None`.
    pub zone: Option<String>,
    /// The provider's own name of a machine type.
    pub instance_type: Option<String>,
    /// Accelerators, in the task's order or as a set.
    pub accelerators: Accelerators,
    /// Virtual CPUs.
    pub cpus: Option<Amount>,
    /// Memory in GiB.
    pub memory_gib: Option<Amount>,
    /// Disk in GiB.
    pub disk_size_gib: Option<u32>,
    /// Whether a machine that may be taken away at any time will do.
    pub use_spot: bool,
    /// Ports the task listens on.
    pub ports: Vec<u16>,
    /// The most the task may cost, in USD per hour and node.
    pub max_hourly_cost_usd: Option<f64>,
    /// Tags for the instance, on top of the ones that mark it as ours.
    pub labels: BTreeMap<String, String>,
    /// When the instance ends by itself; `None` when the task does not say.
    pub autostop: Option<Autostop>,
    /// Other resources that would do, each complete: what it leaves open is filled in.
    pub alternatives: Alternatives,
}

/// Several complete [`Resources`], of which one is enough.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Alternatives {
    /// There are none: the resources themselves are meant.
    #[default]
    None,
    /// `any_of`: the cheapest.
    AnyOf(Vec<Resources>),
    /// `ordered`: the first that can be had, whatever it costs.
    Ordered(Vec<Resources>),
}

/// When an instance that does nothing ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Autostop {
    /// How long it may be idle; `None` for never (`autostop: false`).
    pub idle: Option<Duration>,
    /// Whether it is terminated then, not stopped.
    pub down: bool,
    /// What keeps it from being idle.
    pub wait_for: WaitFor,
}

impl Autostop {
    /// SkyPilot's idle time when a task says `autostop: true`.
    pub const DEFAULT_IDLE: Duration = Duration::from_secs(5 * 60);
}

/// What keeps an instance from being idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// A job that has not ended, or somebody logged in.
    #[default]
    JobsAndSsh,
    /// A job that has not ended.
    Jobs,
    /// Nothing: the time counts from when it was set.
    None,
}

/// A choice of accelerators.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Accelerators {
    /// None are needed.
    #[default]
    None,
    /// A YAML list: the first that can be had, whatever it costs.
    Ordered(Vec<Accelerator>),
    /// A YAML set or mapping, or a single name: the cheapest of them.
    AnyOf(Vec<Accelerator>),
}

impl Accelerators {
    /// The choices in file order.
    pub fn choices(&self) -> &[Accelerator] {
        match self {
            Accelerators::None => &[],
            Accelerators::Ordered(choices) | Accelerators::AnyOf(choices) => choices,
        }
    }
}

/// A number of one kind of accelerator, such as `A100:8`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Accelerator {
    /// The name as catalogues write it; compared without regard to case.
    pub name: String,
    /// How many a node must have.
    pub count: u32,
}

impl Accelerator {
    /// `count` accelerators called `name`.
    pub fn new(name: impl Into<String>, count: u32) -> Self {
        Self {
            name: name.into(),
            count,
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.count)
    }
}

/// `4` means exactly four, `4+` at least four.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Amount {
    /// The number itself.
    pub value: f64,
    /// Whether more will do.
    pub or_more: bool,
}

impl Amount {
    /// Whether `offered` is enough, and not more than asked for.
    pub fn accepts(&self, offered: f64) -> bool {
        if self.or_more {
            offered >= self.value
        } else {
            offered == self.value
        }
    }

    /// Reads `4` or `4+`.
    pub(crate) fn parse(text: &str) -> Option<Amount> {
        let (number, or_more) = match text.strip_suffix('+') {
            Some(number) => (number, true),
            None => (text, false),
        };
        let value: f64 = number.trim().parse().ok()?;
        (value.is_finite() && value > 0.0).then_some(Amount { value, or_more })
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.value, if self.or_more { "+" } else { "" })
    }
}
