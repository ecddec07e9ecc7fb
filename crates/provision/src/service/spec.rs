//! The `service:` section of a task file.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::error::Result;
use crate::task::node::{Node, Value};
use crate::task::{Fields, substitute};

/// How a service is probed and how many replicas it has.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceSpec {
    /// When a replica counts as ready.
    pub readiness_probe: ReadinessProbe,
    /// How many replicas run.
    pub replicas: u32,
}

/// When a replica counts as ready: `GET path` answers 200.
///
/// Names and defaults are SkyPilot's.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadinessProbe {
    /// The path asked for, with its leading slash.
    pub path: String,
    /// How long a starting replica may fail its probe.
    pub initial_delay: Duration,
    /// How long one probe may take.
    pub timeout: Duration,
    /// The pause between two probes.
    pub interval: Duration,
    /// How long a replica that was ready may fail its probe.
    pub failure_threshold: Duration,
}

impl Default for ReadinessProbe {
    fn default() -> Self {
        Self {
            path: "/".to_owned(),
            initial_delay: Duration::from_secs(1200),
            timeout: Duration::from_secs(15),
            interval: Duration::from_secs(10),
            failure_threshold: Duration::from_secs(180),
        }
    }
}

const KNOWN: &[&str] = &["readiness_probe", "replicas"];
const UNSUPPORTED: &[&str] = &[
    "replica_policy",
    "ports",
    "load_balancing_policy",
    "load_balancer",
    "tls",
    "pool",
];
const PROBE_KNOWN: &[&str] = &[
    "path",
    "initial_delay_seconds",
    "timeout_seconds",
    "endpoint_probe_interval_seconds",
    "consecutive_failure_threshold_timeout",
];
const PROBE_UNSUPPORTED: &[&str] = &["post_data", "headers"];

impl ServiceSpec {
    pub(crate) fn from_node(node: Node, envs: &BTreeMap<String, String>) -> Result<Self> {
        let (line, column) = (node.line, node.column);
        let mut fields = Fields::of("service", node, KNOWN, UNSUPPORTED)?;
        let Some(probe) = fields.take("readiness_probe") else {
            let at = Node {
                line,
                column,
                value: Value::Null,
            };
            return Err(at.invalid(
                "service",
                "needs a readiness_probe, such as `readiness_probe: /v1/models`",
            ));
        };
        Ok(ServiceSpec {
            readiness_probe: ReadinessProbe::from_node(probe, envs)?,
            replicas: fields.count("replicas")?.unwrap_or(1),
        })
    }
}

impl ReadinessProbe {
    /// A path alone, or a mapping with the path and its times.
    fn from_node(node: Node, envs: &BTreeMap<String, String>) -> Result<Self> {
        let defaults = ReadinessProbe::default();
        let position = Node {
            line: node.line,
            column: node.column,
            value: Value::Null,
        };
        let (path, mut fields) = match &node.value {
            Value::String(path) => (Some(path.clone()), None),
            _ => {
                let mut fields = Fields::of(
                    "service.readiness_probe",
                    node,
                    PROBE_KNOWN,
                    PROBE_UNSUPPORTED,
                )?;
                (fields.text("path")?, Some(fields))
            }
        };
        let mut seconds = |name: &str, default: Duration| -> Result<Duration> {
            let given = fields
                .as_mut()
                .map_or(Ok(None), |fields| fields.number(name))?;
            Ok(given.map_or(default, Duration::from_secs_f64))
        };
        let path = path.map(|path| substitute(&path, envs)).unwrap_or_default();
        if !path.starts_with('/') {
            return Err(position.invalid("service.readiness_probe.path", "must begin with `/`"));
        }
        Ok(ReadinessProbe {
            path,
            initial_delay: seconds("initial_delay_seconds", defaults.initial_delay)?,
            timeout: seconds("timeout_seconds", defaults.timeout)?,
            interval: seconds("endpoint_probe_interval_seconds", defaults.interval)?,
            failure_threshold: seconds(
                "consecutive_failure_threshold_timeout",
                defaults.failure_threshold,
            )?,
        })
    }
}
