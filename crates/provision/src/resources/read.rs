//! Reading the `resources:` section of a task file, whose shape has been checked.

use std::time::Duration;

use super::{Accelerator, Accelerators, Alternatives, Amount, Autostop, Resources, WaitFor};
use crate::error::{Error, Result};
use crate::task::Fields;
use crate::task::node::{Node, Value};
use crate::task::surface::CLOUDS;

impl Resources {
    /// Reads the section; fields that only some values of are refused go to `refused`.
    pub(crate) fn from_node(node: &Node, refused: &mut Vec<Error>) -> Result<Self> {
        let (any_of, ordered) = (child(node, "any_of"), child(node, "ordered"));
        if let (Some(_), Some(ordered)) = (&any_of, &ordered) {
            return Err(ordered.invalid(
                "resources.ordered",
                "cannot stand beside any_of; keep one of the two",
            ));
        }
        let base = one(node.clone(), refused)?;
        let several = base.accelerators.choices().len() > 1;
        let is_list = matches!(base.accelerators, Accelerators::Ordered(_));
        let merged = |candidates: &Node, refused: &mut Vec<Error>| -> Result<Vec<Resources>> {
            let Value::Sequence(items) = &candidates.value else {
                return Ok(Vec::new());
            };
            items
                .iter()
                .map(|item| one(overlay(node, item), refused))
                .collect()
        };
        let alternatives = match (any_of, ordered) {
            (Some(any_of), None) if several && is_list => {
                return Err(any_of.invalid(
                    "resources.any_of",
                    "cannot stand beside a list of accelerators, which is an order; make it a set",
                ));
            }
            (None, Some(ordered)) if several => {
                return Err(ordered.invalid(
                    "resources.ordered",
                    "cannot stand beside several accelerators; name them in its entries",
                ));
            }
            (Some(any_of), None) => Alternatives::AnyOf(merged(&any_of, refused)?),
            (None, Some(ordered)) => Alternatives::Ordered(merged(&ordered, refused)?),
            _ => Alternatives::None,
        };
        let alternatives = match alternatives {
            // An empty list of alternatives is none at all.
            Alternatives::AnyOf(list) | Alternatives::Ordered(list) if list.is_empty() => {
                Alternatives::None
            }
            alternatives => alternatives,
        };
        Ok(Resources {
            alternatives,
            ..base
        })
    }
}

/// The value of a key that is not null.
fn child(node: &Node, name: &str) -> Option<Node> {
    node.get(name)
        .filter(|value| !matches!(value.value, Value::Null))
        .cloned()
}

/// The base with the fields of one alternative in place of its own; labels are joined.
fn overlay(base: &Node, item: &Node) -> Node {
    let (Value::Mapping(base_entries), Value::Mapping(own)) = (&base.value, &item.value) else {
        return item.clone();
    };
    let name = |key: &Node| match key.scalar_text().unwrap_or_default().as_str() {
        "gpus" => "accelerators".to_owned(),
        other => other.to_owned(),
    };
    let mut entries: Vec<(Node, Node)> = own.clone();
    for (key, value) in base_entries {
        let wanted = name(key);
        if matches!(wanted.as_str(), "any_of" | "ordered") {
            continue;
        }
        match entries.iter_mut().find(|(own, _)| name(own) == wanted) {
            None => entries.push((key.clone(), value.clone())),
            Some((_, own)) if wanted == "labels" => {
                if let (Value::Mapping(own), Value::Mapping(more)) = (&mut own.value, &value.value)
                {
                    let missing = |(key, _): &&(Node, Node)| {
                        !own.iter()
                            .any(|(have, _)| have.scalar_text() == key.scalar_text())
                    };
                    let more: Vec<_> = more.iter().filter(missing).cloned().collect();
                    own.extend(more);
                }
            }
            Some(_) => {}
        }
    }
    Node {
        value: Value::Mapping(entries),
        ..item.clone()
    }
}

fn one(node: Node, refused: &mut Vec<Error>) -> Result<Resources> {
    let mut fields = Fields::of("resources", node);
    let accelerators = match (fields.take("accelerators"), fields.take("gpus")) {
        (Some(_), Some(gpus)) => {
            return Err(gpus.invalid(
                "resources.gpus",
                "is another name of accelerators; keep one",
            ));
        }
        (accelerators, gpus) => accelerators.or(gpus),
    };
    let mut resources = Resources {
        cloud: fields.text("cloud")?.map(|cloud| cloud.to_lowercase()),
        region: fields.text("region")?,
        zone: fields.text("zone")?,
        instance_type: fields.text("instance_type")?,
        accelerators: match accelerators {
            Some(node) => read_accelerators(&node, refused)?,
            None => Accelerators::None,
        },
        cpus: fields
            .take("cpus")
            .map(|node| amount(&node, "resources.cpus", Amount::parse))
            .transpose()?,
        memory_gib: fields
            .take("memory")
            .map(|node| amount(&node, "resources.memory", memory))
            .transpose()?,
        disk_size_gib: fields
            .take("disk_size")
            .map(|node| disk(&node))
            .transpose()?,
        use_spot: fields.boolean("use_spot")?.unwrap_or(false),
        ports: fields
            .take("ports")
            .map_or(Ok(Vec::new()), |node| read_ports(&node))?,
        max_hourly_cost_usd: fields.number("max_hourly_cost")?,
        labels: fields
            .take("labels")
            .map_or_else(Default::default, |node| node.text_map()),
        autostop: fields
            .take("autostop")
            .and_then(|node| read_autostop(node).transpose())
            .transpose()?,
        alternatives: Alternatives::None,
    };
    if let Some(infra) = fields.take("infra") {
        read_infra(&infra, &mut resources)?;
    }
    Ok(resources)
}

fn amount(node: &Node, field: &str, read: fn(&str) -> Option<Amount>) -> Result<Amount> {
    let text = node.scalar_text().unwrap_or_default();
    read(&text)
        .ok_or_else(|| node.invalid(field, "must be a number such as 4, or 4+ for at least four"))
}

/// `16`, `16+`, `16GB`, `16GB+`: gibibytes unless a unit says otherwise.
fn memory(text: &str) -> Option<Amount> {
    let (text, or_more) = match text.strip_suffix('+') {
        Some(text) => (text, true),
        None => (text, false),
    };
    let value = gib(text)?;
    (value > 0.0).then_some(Amount { value, or_more })
}

/// A size in GiB; without a unit it is one already.
fn gib(text: &str) -> Option<f64> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[number.len()..].to_ascii_lowercase();
    let scale = match unit.as_str() {
        "" | "gb" | "gi" => 1.0,
        "kb" | "ki" => 1.0 / (1024.0 * 1024.0),
        "mb" | "mi" => 1.0 / 1024.0,
        "tb" | "ti" => 1024.0,
        "pb" | "pi" => 1024.0 * 1024.0,
        _ => return None,
    };
    let value: f64 = number.parse().ok()?;
    value.is_finite().then_some(value * scale)
}

fn disk(node: &Node) -> Result<u32> {
    let size = node.scalar_text().as_deref().and_then(gib);
    size.filter(|size| *size >= 1.0 && *size <= f64::from(u32::MAX) && size.fract() == 0.0)
        .map(|size| size as u32)
        .ok_or_else(|| {
            node.invalid(
                "resources.disk_size",
                "must be whole gibibytes, such as 256 or 1TB",
            )
        })
}

const FIELD: &str = "resources.accelerators";

/// A name, a list (an order), or a set or mapping (any of).
fn read_accelerators(node: &Node, refused: &mut Vec<Error>) -> Result<Accelerators> {
    let mut read = |node: &Node, text: &str, count: Option<&Node>| {
        read_accelerator(node, text, count, refused)
    };
    let (choices, ordered): (Vec<_>, bool) = match &node.value {
        Value::Sequence(items) if items.is_empty() => {
            return Err(node.invalid(FIELD, "must list at least one; leave it out for none"));
        }
        Value::Sequence(items) => {
            let choices = items
                .iter()
                .map(|item| read(item, &item.scalar_text().unwrap_or_default(), None));
            (choices.collect::<Result<_>>()?, true)
        }
        Value::Mapping(entries) => {
            let choices = entries
                .iter()
                .map(|(key, count)| read(key, &key.scalar_text().unwrap_or_default(), Some(count)));
            (choices.collect::<Result<_>>()?, false)
        }
        _ => (
            vec![read(node, &node.scalar_text().unwrap_or_default(), None)?],
            false,
        ),
    };
    let mut unique: Vec<Accelerator> = Vec::new();
    for choice in choices.into_iter().flatten() {
        if !unique.contains(&choice) {
            unique.push(choice);
        }
    }
    Ok(match (unique.is_empty(), ordered) {
        (true, _) => Accelerators::None,
        (false, true) => Accelerators::Ordered(unique),
        (false, false) => Accelerators::AnyOf(unique),
    })
}

/// `A100`, `A100:8`, or the key and value of `{A100: 8}`; a null value means one.
///
/// `None`, with a refusal, for what SkyPilot reads and Updraft does not: part of an accelerator, or
/// one named by its memory.
fn read_accelerator(
    node: &Node,
    text: &str,
    count: Option<&Node>,
    refused: &mut Vec<Error>,
) -> Result<Option<Accelerator>> {
    let whole = match count.and_then(Node::number) {
        Some(count) => format!("{text}:{count}"),
        None => text.to_owned(),
    };
    let parts: Vec<&str> = whole.split(':').collect();
    let is_memory = |text: &str| {
        let text = text.strip_suffix('+').unwrap_or(text);
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        !digits.is_empty()
            && digits.bytes().all(|byte| byte.is_ascii_digit())
            && ["gb", "mb", "tb"].contains(&text[digits.len()..].to_ascii_lowercase().as_str())
    };
    let refuse = |refused: &mut Vec<Error>| {
        refused.push(Error::Unsupported {
            field: format!("{FIELD} ({text})"),
            line: node.line,
            column: node.column,
        });
        Ok(None)
    };
    let wrong = || {
        node.invalid(
            FIELD,
            format!("has `{text}`; write a name and a positive number, such as A100:8"),
        )
    };
    let (name, count) = match parts.as_slice() {
        [memory] if is_memory(memory) => return refuse(refused),
        [name] => (*name, 1.0),
        [first, second] if is_memory(first) || is_memory(second) => return refuse(refused),
        [name, count] => (*name, count.trim().parse().map_err(|_| wrong())?),
        [_, memory, count] if is_memory(memory) && count.parse::<u32>().is_ok() => {
            return refuse(refused);
        }
        _ => return Err(wrong()),
    };
    if !(count > 0.0 && count <= f64::from(u32::MAX)) || name.trim().is_empty() {
        return Err(wrong());
    }
    if f64::fract(count) != 0.0 {
        return refuse(refused);
    }
    Ok(Some(Accelerator::new(name.trim(), count as u32)))
}

/// Ports and ranges of ports.
fn read_ports(node: &Node) -> Result<Vec<u16>> {
    let items = match &node.value {
        Value::Sequence(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let mut ports = Vec::new();
    for item in items {
        let text = item.scalar_text().unwrap_or_default();
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => ports.extend(first..=last),
            _ => {
                return Err(item.invalid(
                    "resources.ports",
                    "must be ports from 1 to 65535, or ranges such as 8000-8010",
                ));
            }
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// A switch, a time, or a mapping; `None` when it says nothing.
fn read_autostop(node: Node) -> Result<Option<Autostop>> {
    let with = |idle| Autostop {
        idle,
        down: false,
        wait_for: WaitFor::default(),
    };
    let wrong = node.invalid(
        "resources.autostop",
        "must be minutes that are not negative",
    );
    Ok(Some(match &node.value {
        Value::Bool(true) => with(Some(Autostop::DEFAULT_IDLE)),
        Value::Bool(false) => with(None),
        Value::Integer(_) | Value::String(_) => {
            let text = node.scalar_text().unwrap_or_default();
            with(Some(minutes(&text).ok_or(wrong)?))
        }
        _ => {
            let mut fields = Fields::of("resources.autostop", node);
            let idle = fields.number("idle_minutes")?;
            let idle = idle.map_or(Ok(Autostop::DEFAULT_IDLE), |minutes| {
                Duration::try_from_secs_f64(minutes * 60.0).map_err(|_| wrong)
            });
            Autostop {
                idle: Some(idle?),
                down: fields.boolean("down")?.unwrap_or(false),
                wait_for: match fields
                    .text("wait_for")?
                    .map(|text| text.to_lowercase())
                    .as_deref()
                {
                    Some("jobs") => WaitFor::Jobs,
                    Some("none") => WaitFor::None,
                    _ => WaitFor::JobsAndSsh,
                },
            }
        }
    }))
}

/// `10`, `10m`, `2h`, `1d`, `1w`.
pub(crate) fn minutes(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        "w" => 7 * 24 * 60 * 60,
        _ => return None,
    };
    let seconds = digits.parse::<u64>().ok()?.checked_mul(scale)?;
    Some(Duration::from_secs(seconds))
}

/// `cloud`, `cloud/region`, `cloud/region/zone`, with `*` for any; what follows `ssh/` or `k8s/` is
/// one name, slashes and all.
fn read_infra(node: &Node, resources: &mut Resources) -> Result<()> {
    let text = node.scalar_text().unwrap_or_default();
    if resources.cloud.is_some() || resources.region.is_some() || resources.zone.is_some() {
        return Err(node.invalid(
            "resources.infra",
            "cannot stand beside cloud, region or zone; keep infra",
        ));
    }
    let wrong = || {
        node.invalid(
            "resources.infra",
            "must be cloud, cloud/region or cloud/region/zone of a cloud that is known, with * for any",
        )
    };
    let mut parts = text.splitn(2, '/');
    let cloud = match parts.next().unwrap_or_default().to_lowercase().as_str() {
        "k8s" => "kubernetes".to_owned(),
        cloud => cloud.to_owned(),
    };
    if cloud != "*" && !CLOUDS.contains(&cloud.as_str()) {
        return Err(wrong());
    }
    let rest = parts.next();
    let any = |part: &str| (part != "*").then(|| part.to_owned());
    match (cloud.as_str(), rest) {
        (_, Some("")) => return Err(wrong()),
        ("kubernetes" | "ssh", rest) => resources.region = rest.map(str::to_owned),
        (_, Some(rest)) => {
            let places: Vec<&str> = rest.split('/').collect();
            if places.len() > 2 || places.iter().any(|place| place.is_empty()) {
                return Err(wrong());
            }
            resources.region = any(places[0]);
            resources.zone = places.get(1).and_then(|zone| any(zone));
        }
        (_, None) => {}
    }
    resources.cloud = any(&cloud);
    Ok(())
}
