//! The `service:` section of a task file.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::task::Fields;
use crate::task::node::{Node, Value};

/// How a service is probed and how many replicas it has.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceSpec {
    /// When a replica counts as ready.
    pub readiness_probe: ReadinessProbe,
    /// How many replicas run.
    pub replicas: u32,
    /// The port the replicas listen on; the first of `resources.ports` when `None`.
    pub port: Option<u16>,
    /// Which replica gets the next request.
    pub load_balancing: LoadBalancing,
    /// How long a replica may take until its response begins; for ever when `None`.
    pub stream_timeout: Option<Duration>,
}

/// Which replica gets the next request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoadBalancing {
    /// The one with the fewest requests under way.
    #[default]
    LeastLoad,
    /// One after the other.
    RoundRobin,
}

/// When a replica counts as ready: `GET path` answers 200.
///
/// Names and defaults are SkyPilot's.
#[derive(Clone, PartialEq)]
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
    /// The JSON that is posted; without it the probe is a `GET`.
    pub post_data: Option<String>,
    /// Headers of the probe.
    pub headers: BTreeMap<String, String>,
}

/// Headers, query and what is posted often hold keys: none of them is shown.
impl fmt::Debug for ReadinessProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadinessProbe")
            .field("path", &self.public_path())
            .field("initial_delay", &self.initial_delay)
            .field("timeout", &self.timeout)
            .field("interval", &self.interval)
            .field("failure_threshold", &self.failure_threshold)
            .field("posts", &self.post_data.is_some())
            .field("headers", &self.headers.keys())
            .finish()
    }
}

impl Default for ReadinessProbe {
    fn default() -> Self {
        Self {
            path: "/".to_owned(),
            initial_delay: Duration::from_secs(1200),
            timeout: Duration::from_secs(15),
            interval: Duration::from_secs(10),
            failure_threshold: Duration::from_secs(180),
            post_data: None,
            headers: BTreeMap::new(),
        }
    }
}

impl ServiceSpec {
    pub(crate) fn from_node(node: Node, refused: &mut Vec<Error>) -> Result<Self> {
        let mut fields = Fields::of("service", node);
        let replicas = fields.take("replicas");
        let policy = fields.take("replica_policy");
        if let (Some(_), Some(policy)) = (&replicas, &policy) {
            return Err(policy.invalid("service.replica_policy", "cannot stand beside replicas"));
        }
        let balancing = fields.take("load_balancing_policy");
        if let (Some(balancing), None) =
            (balancing.as_ref().filter(|b| is_instance_aware(b)), &policy)
        {
            return Err(balancing.invalid(
                "service.load_balancing_policy",
                "needs replica_policy.target_qps_per_replica as a mapping",
            ));
        }
        let replicas = match (replicas, policy) {
            (Some(node), _) => count(&node, "service.replicas")?,
            (_, Some(policy)) => read_policy(policy, balancing.as_ref())?,
            (None, None) => 1,
        };
        let port = fields
            .take("ports")
            .map(|node| {
                let port = node.number().filter(|port| (1.0..=65535.0).contains(port));
                port.map(|port| port as u16)
                    .ok_or_else(|| node.invalid("service.ports", "must be a port from 1 to 65535"))
            })
            .transpose()?;
        let mut balancer = fields
            .take("load_balancer")
            .map(|node| Fields::of("service.load_balancer", node));
        let stream_timeout = balancer
            .as_mut()
            .map_or(Ok(None), |fields| fields.seconds("stream_timeout_seconds"))?;
        let spec = ServiceSpec {
            readiness_probe: match fields.take("readiness_probe") {
                Some(probe) => ReadinessProbe::from_node(probe)?,
                None => ReadinessProbe::default(),
            },
            replicas,
            port,
            load_balancing: match balancing.as_ref().and_then(Node::scalar_text).as_deref() {
                Some("round_robin") => LoadBalancing::RoundRobin,
                _ => LoadBalancing::LeastLoad,
            },
            stream_timeout,
        };
        if let Some(node) = balancing
            .filter(|node| node.scalar_text().as_deref() == Some("instance_aware_least_load"))
        {
            refused.push(Error::Unsupported {
                field: "service.load_balancing_policy (instance_aware_least_load)".to_owned(),
                line: node.line,
                column: node.column,
            });
        }
        Ok(spec)
    }
}

fn is_instance_aware(node: &Node) -> bool {
    node.scalar_text().as_deref() == Some("instance_aware_least_load")
}

fn count(node: &Node, field: &str) -> Result<u32> {
    match node.value {
        Value::Integer(value) => u32::try_from(value).ok(),
        _ => None,
    }
    .ok_or_else(|| node.invalid(field, "must be a whole number of at least 0"))
}

/// A fixed number of replicas written as a policy; the fields of autoscaling were refused by shape.
fn read_policy(node: Node, balancing: Option<&Node>) -> Result<u32> {
    const MAX: &str = "service.replica_policy.max_replicas";
    let at = node.clone();
    let mut fields = Fields::of("service.replica_policy", node);
    let min = fields.take("min_replicas").map_or(Ok(1), |node| {
        count(&node, "service.replica_policy.min_replicas")
    })?;
    let max = fields
        .take("max_replicas")
        .map(|node| count(&node, MAX))
        .transpose()?;
    let target = fields.take("target_qps_per_replica");
    let instance_aware = balancing.is_some_and(is_instance_aware);
    let by_type = target
        .as_ref()
        .is_some_and(|target| matches!(target.value, Value::Mapping(_)));
    if instance_aware != by_type {
        return Err(at.invalid(
            "service.replica_policy.target_qps_per_replica",
            "must be a mapping exactly when load_balancing_policy is instance_aware_least_load",
        ));
    }
    match (max, target) {
        (Some(max), _) if max < min => Err(at.invalid(MAX, "must be at least min_replicas")),
        (None, Some(_)) => Err(at.invalid(MAX, "must be set with target_qps_per_replica")),
        (Some(max), None) if max != min => Err(at.invalid(
            MAX,
            "must be min_replicas unless target_qps_per_replica says when to scale",
        )),
        _ => Ok(min),
    }
}

impl ReadinessProbe {
    /// The path without its query, for messages.
    pub(crate) fn public_path(&self) -> &str {
        self.path.split('?').next().unwrap_or_default()
    }

    /// A path alone, or a mapping with the path and its times.
    fn from_node(node: Node) -> Result<Self> {
        let defaults = ReadinessProbe::default();
        let at = node.clone();
        let path = match node.scalar_text() {
            Some(path) => path,
            None => node
                .get("path")
                .and_then(Node::scalar_text)
                .unwrap_or_default(),
        };
        if !path.starts_with('/') {
            return Err(at.invalid("service.readiness_probe.path", "must begin with `/`"));
        }
        let mut fields = Fields::of("service.readiness_probe", node);
        let mut seconds = |name: &str, default: Duration| -> Result<Duration> {
            Ok(fields.seconds(name)?.unwrap_or(default))
        };
        Ok(ReadinessProbe {
            path,
            initial_delay: seconds("initial_delay_seconds", defaults.initial_delay)?,
            timeout: seconds("timeout_seconds", defaults.timeout)?,
            interval: seconds("endpoint_probe_interval_seconds", defaults.interval)?,
            failure_threshold: seconds(
                "consecutive_failure_threshold_timeout",
                defaults.failure_threshold,
            )?,
            post_data: fields
                .take("post_data")
                .map(|node| read_post_data(&node))
                .transpose()?,
            headers: fields
                .take("headers")
                .map_or_else(BTreeMap::new, |node| node.text_map()),
        })
    }
}

/// JSON as text or as YAML, kept as the text that is sent.
fn read_post_data(node: &Node) -> Result<String> {
    match &node.value {
        Value::String(text) => {
            serde_json::from_str::<serde_json::Value>(text)
                .map_err(|_| node.invalid("service.readiness_probe.post_data", "must be JSON"))?;
            Ok(text.clone())
        }
        _ => Ok(node.to_json().to_string()),
    }
}
