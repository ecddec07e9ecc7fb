//! What a task needs of a node.

use std::fmt;

use crate::error::Result;
use crate::task::Fields;
use crate::task::node::{Node, Value};

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
#[derive(Debug, Clone, PartialEq)]
pub struct Accelerator {
    /// The name as catalogues write it; compared without regard to case.
    pub name: String,
    /// How many a node must have.
    pub count: u32,
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

    fn parse(text: &str) -> Option<Amount> {
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

const KNOWN: &[&str] = &[
    "cloud",
    "region",
    "zone",
    "instance_type",
    "accelerators",
    "gpus",
    "cpus",
    "memory",
    "disk_size",
    "use_spot",
    "ports",
    "max_hourly_cost",
];

const UNSUPPORTED: &[&str] = &[
    "infra",
    "job_recovery",
    "any_of",
    "ordered",
    "disk_tier",
    "ephemeral_storage",
    "local_disk",
    "network_tier",
    "volumes",
    "image_id",
    "labels",
    "autostop",
    "priority",
    "priority_class",
    "accelerator_args",
];

impl Resources {
    pub(crate) fn from_node(node: Node) -> Result<Self> {
        let mut fields = Fields::of("resources", node, KNOWN, UNSUPPORTED)?;
        let accelerators = fields.take("accelerators").or_else(|| fields.take("gpus"));
        Ok(Resources {
            cloud: fields.text("cloud")?.map(|cloud| cloud.to_lowercase()),
            region: fields.text("region")?,
            zone: fields.text("zone")?,
            instance_type: fields.text("instance_type")?,
            accelerators: accelerators
                .map_or(Ok(Accelerators::None), |node| read_accelerators(&node))?,
            cpus: amount(&mut fields, "cpus")?,
            memory_gib: amount(&mut fields, "memory")?,
            disk_size_gib: fields.count("disk_size")?,
            use_spot: fields.boolean("use_spot")?.unwrap_or(false),
            ports: fields
                .take("ports")
                .map_or(Ok(Vec::new()), |node| read_ports(&node))?,
            max_hourly_cost_usd: fields.number("max_hourly_cost")?,
        })
    }
}

fn amount(fields: &mut Fields, name: &str) -> Result<Option<Amount>> {
    let Some(node) = fields.take(name) else {
        return Ok(None);
    };
    match node.scalar_text().as_deref().and_then(Amount::parse) {
        Some(amount) => Ok(Some(amount)),
        None => Err(node.invalid(
            &fields.path(name),
            "must be a number such as 4, or 4+ for at least four",
        )),
    }
}

/// A name, a list (an order), or a set or mapping (any of).
fn read_accelerators(node: &Node) -> Result<Accelerators> {
    match &node.value {
        Value::String(text) => Ok(Accelerators::AnyOf(vec![read_accelerator(
            node, text, None,
        )?])),
        Value::Sequence(items) => {
            let choices = items.iter().map(|item| match &item.value {
                Value::String(text) => read_accelerator(item, text, None),
                _ => Err(item.invalid(FIELD, "must list names such as A100:8")),
            });
            Ok(Accelerators::Ordered(choices.collect::<Result<_>>()?))
        }
        Value::Mapping(entries) => {
            let choices = entries.iter().map(|(key, count)| {
                read_accelerator(key, &key.scalar_text().unwrap_or_default(), Some(count))
            });
            Ok(Accelerators::AnyOf(choices.collect::<Result<_>>()?))
        }
        _ => Err(node.invalid(
            FIELD,
            "must be a name such as A100:8, a list or a set of them",
        )),
    }
}

const FIELD: &str = "resources.accelerators";

/// `A100`, `A100:8`, or the key and value of `{A100: 8}`; a null value means one.
fn read_accelerator(node: &Node, text: &str, count: Option<&Node>) -> Result<Accelerator> {
    let (name, count) = match (text.split_once(':'), count.map(|count| &count.value)) {
        (Some((name, count)), None | Some(Value::Null)) => (name, count.trim().parse().ok()),
        (None, None | Some(Value::Null)) => (text, Some(1)),
        (None, Some(Value::Integer(count))) => (text, u32::try_from(*count).ok()),
        _ => (text, None),
    };
    match count.filter(|count| *count > 0 && !name.trim().is_empty()) {
        Some(count) => Ok(Accelerator {
            name: name.trim().to_owned(),
            count,
        }),
        None => Err(node.invalid(
            FIELD,
            format!("has `{text}`; write a name and a whole number, such as A100:8"),
        )),
    }
}

fn read_ports(node: &Node) -> Result<Vec<u16>> {
    let items = match &node.value {
        Value::Sequence(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    items
        .iter()
        .map(|item| {
            let port = item.scalar_text().and_then(|text| text.parse::<u16>().ok());
            port.filter(|port| *port > 0)
                .ok_or_else(|| item.invalid("resources.ports", "must be ports from 1 to 65535"))
        })
        .collect()
}
