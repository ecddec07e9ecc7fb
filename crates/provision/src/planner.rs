//! From offers to an ordered list of candidates: a pure function that can explain itself.

use std::collections::BTreeMap;
use std::fmt;

use crate::catalog::near_names;
use crate::offer::Offer;
use crate::resources::{Accelerators, Alternatives, Resources};
use crate::task::Task;

/// What clouds ask for a GB that leaves them; the data of a task may lie elsewhere.
const EGRESS_USD_PER_GB: f64 = 0.09;

/// The candidates for a task, best first, and why the others are none.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// What to try, in this order.
    pub candidates: Vec<Offer>,
    /// What was passed over, with the first reason that excluded it.
    pub skipped: Vec<Skipped>,
    /// What the task may have meant where nothing has the name it gave.
    pub hints: Vec<String>,
    /// What reading the task's input costs once, by provider; absent when it is there already.
    pub egress_usd: BTreeMap<String, f64>,
    /// How many nodes the task runs on.
    pub num_nodes: u32,
}

/// An offer that does not fit.
#[derive(Debug, Clone)]
pub struct Skipped {
    /// The offer.
    pub offer: Offer,
    /// Why it does not fit, in words.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Offer {
            provider,
            instance_type,
            region,
            ..
        } = &self.offer;
        write!(f, "{provider} {instance_type} in {region}: {}", self.reason)
    }
}

/// Orders the `offers` that satisfy `resources`: by the task's accelerator order, then by price.
///
/// An accelerator list is an order whatever the price; a set is the cheapest of any. So are
/// `ordered` and `any_of`.
pub fn plan(resources: &Resources, offers: Vec<Offer>) -> Plan {
    order(resources, offers, 1, None)
}

impl Plan {
    /// As [`plan`], for all of the task's nodes, with the cost of bringing its input to another
    /// cloud added to the price of the first hour.
    pub fn for_task(task: &Task, offers: Vec<Offer>) -> Plan {
        let input = task
            .inputs
            .as_ref()
            .and_then(|(url, gb)| Some((home_of(url)?, gb * EGRESS_USD_PER_GB)));
        order(&task.resources, offers, task.num_nodes.max(1), input)
    }

    /// As [`Plan::for_task`], for tasks that run one after the other on the same nodes: a candidate fits
    /// all of them, in the order that the first prefers, and there are nodes enough for each.
    pub fn for_tasks(first: &Task, later: &[Task], offers: Vec<Offer>) -> Plan {
        let mut plan = Plan::for_task(first, offers);
        for task in later {
            plan.num_nodes = plan.num_nodes.max(task.num_nodes);
            for offer in std::mem::take(&mut plan.candidates) {
                match rank(&task.resources, &offer) {
                    Ok(_) => plan.candidates.push(offer),
                    Err(reason) => {
                        let name = task.name.as_deref().unwrap_or("a later task");
                        let reason = format!("does not do for `{name}`: {reason}");
                        plan.skipped.push(Skipped { offer, reason });
                    }
                }
            }
        }
        plan
    }

    /// What the first hour of a candidate costs, all nodes and the input's way included.
    pub fn first_hour_usd(&self, offer: &Offer) -> f64 {
        let egress = self.egress_usd.get(&offer.provider).copied().unwrap_or(0.0);
        offer.usd_per_hour * f64::from(self.num_nodes) + egress
    }
}

/// The provider whose buckets a URL names.
fn home_of(url: &str) -> Option<&'static str> {
    match url.split_once("://")?.0 {
        "s3" => Some("aws"),
        "gs" | "gcs" => Some("gcp"),
        "az" => Some("azure"),
        _ => None,
    }
}

fn order(
    resources: &Resources,
    offers: Vec<Offer>,
    num_nodes: u32,
    input: Option<(&'static str, f64)>,
) -> Plan {
    let hints = hints(resources, &offers);
    let mut plan = Plan {
        hints,
        num_nodes,
        ..Plan::default()
    };
    let mut ranked = Vec::new();
    for offer in offers {
        if let Some((_, usd)) =
            input.filter(|(home, _)| *home != offer.provider && offer.usd_per_hour > 0.0)
        {
            plan.egress_usd.insert(offer.provider.clone(), usd);
        }
        match rank(resources, &offer) {
            Ok(preference) => ranked.push((preference, offer)),
            Err(reason) => plan.skipped.push(Skipped { offer, reason }),
        }
    }
    // A stable sort: equal offers keep the provider's order.
    ranked.sort_by(|(pa, a), (pb, b)| {
        let costs = plan.first_hour_usd(a).total_cmp(&plan.first_hour_usd(b));
        pa.cmp(pb).then(costs)
    });
    plan.candidates = ranked.into_iter().map(|(_, offer)| offer).collect();
    plan
}

/// The offer's place in the task's order: of alternatives first, then of accelerators.
fn rank(resources: &Resources, offer: &Offer) -> Result<(usize, usize), String> {
    let (choices, is_order) = match &resources.alternatives {
        Alternatives::None => return fit(resources, offer).map(|place| (0, place)),
        Alternatives::AnyOf(choices) => (choices, false),
        Alternatives::Ordered(choices) => (choices, true),
    };
    let mut reasons = Vec::new();
    for (index, choice) in choices.iter().enumerate() {
        match fit(choice, offer) {
            Ok(place) => return Ok((if is_order { index } else { 0 }, place)),
            Err(reason) if !reasons.contains(&reason) => reasons.push(reason),
            Err(_) => {}
        }
    }
    Err(reasons.join("; or "))
}

/// The resources that an offer was taken for: the first of the alternatives that it fits.
pub(crate) fn chosen<'a>(resources: &'a Resources, offer: &Offer) -> &'a Resources {
    match &resources.alternatives {
        Alternatives::None => resources,
        Alternatives::AnyOf(choices) | Alternatives::Ordered(choices) => {
            let fits = |choice: &&Resources| fit(choice, offer).is_ok();
            choices.iter().find(fits).unwrap_or(resources)
        }
    }
}

/// The offer's place in the order of accelerators, or why it does not fit.
fn fit(resources: &Resources, offer: &Offer) -> Result<usize, String> {
    let same = |wanted: &Option<String>, offered: &str, what: &str| match wanted {
        Some(wanted) if !wanted.eq_ignore_ascii_case(offered) => {
            Err(format!("the task asks for {what} {wanted}"))
        }
        _ => Ok(()),
    };
    same(&resources.cloud, &offer.provider, "cloud")?;
    same(&resources.region, &offer.region, "region")?;
    same(
        &resources.zone,
        offer.zone.as_deref().unwrap_or_default(),
        "zone",
    )?;
    same(
        &resources.instance_type,
        &offer.instance_type,
        "instance type",
    )?;
    if let Some(cpus) = resources.cpus.filter(|cpus| !cpus.accepts(offer.cpus)) {
        return Err(format!("has {} cpus, the task asks for {cpus}", offer.cpus));
    }
    if let Some(memory) = resources
        .memory_gib
        .filter(|memory| !memory.accepts(offer.memory_gib))
    {
        return Err(format!(
            "has {:.0} GiB of memory, the task asks for {memory}",
            offer.memory_gib
        ));
    }
    if let (Some(asked), Some(free)) = (resources.disk_size_gib, offer.disk_gib)
        && free < f64::from(asked)
    {
        return Err(format!(
            "has {free:.0} GiB of free disk, the task asks for {asked}"
        ));
    }
    // A machine one has cannot be taken away: it serves a task that would put up with less.
    if offer.spot != resources.use_spot && (offer.spot || offer.usd_per_hour > 0.0) {
        let (has, wants) = if offer.spot {
            ("spot", "on demand")
        } else {
            ("on demand", "spot")
        };
        return Err(format!("is {has}, the task asks for {wants}"));
    }
    if let Some(limit) = resources
        .max_hourly_cost_usd
        .filter(|limit| offer.usd_per_hour > *limit)
    {
        return Err(format!(
            "costs {:.2} USD/h, the task allows {limit:.2}",
            offer.usd_per_hour
        ));
    }
    rank_accelerator(&resources.accelerators, offer)
}

fn rank_accelerator(accelerators: &Accelerators, offer: &Offer) -> Result<usize, String> {
    let choices = accelerators.choices();
    if choices.is_empty() {
        return Ok(0);
    }
    let fits = |index: &usize| {
        offer.accelerator.as_ref().is_some_and(|offered| {
            offered.name.eq_ignore_ascii_case(&choices[*index].name)
                && offered.count == choices[*index].count
        })
    };
    let has = offer
        .accelerator
        .as_ref()
        .map_or("no accelerator".to_owned(), ToString::to_string);
    let names: Vec<_> = choices.iter().map(ToString::to_string).collect();
    match (0..choices.len()).find(fits) {
        None => Err(format!(
            "has {has}, the task asks for {}",
            names.join(" or ")
        )),
        Some(_) if matches!(accelerators, Accelerators::AnyOf(_)) => Ok(0),
        Some(index) => Ok(index),
    }
}

/// For every accelerator that no offer has under that name: what is near.
fn hints(resources: &Resources, offers: &[Offer]) -> Vec<String> {
    let alternatives = match &resources.alternatives {
        Alternatives::None => std::slice::from_ref(resources),
        Alternatives::AnyOf(list) | Alternatives::Ordered(list) => list,
    };
    let names = alternatives
        .iter()
        .flat_map(|choice| choice.accelerators.choices());
    let mut hints = Vec::new();
    for wanted in names {
        let near = near_names(&wanted.name, offers);
        let is_known = near
            .first()
            .is_some_and(|name| name.eq_ignore_ascii_case(&wanted.name));
        if !is_known && !near.is_empty() {
            let hint = format!(
                "nothing is called {}; did you mean {}?",
                wanted.name,
                near.join(" or ")
            );
            if !hints.contains(&hint) {
                hints.push(hint);
            }
        }
    }
    hints
}

impl fmt::Display for Plan {
    /// A table of candidates with their prices, then what was skipped, by reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, offer) in self.candidates.iter().enumerate() {
            let accelerator = offer
                .accelerator
                .as_ref()
                .map_or("-".to_owned(), ToString::to_string);
            write!(
                f,
                "{:>2}. {:<10} {:<16} {:<12} {:>4} cpus {:>5.0} GiB {:<12} {:<9} {:>8.2} USD/h",
                index + 1,
                offer.provider,
                offer.instance_type,
                offer.zone.as_deref().unwrap_or(&offer.region),
                offer.cpus,
                offer.memory_gib,
                accelerator,
                if offer.spot { "spot" } else { "on demand" },
                offer.usd_per_hour * f64::from(self.num_nodes),
            )?;
            match self.egress_usd.get(&offer.provider) {
                Some(usd) => writeln!(f, " + {usd:.2} USD to bring the input")?,
                None => writeln!(f)?,
            }
        }
        let mut by_reason: BTreeMap<&str, Vec<&Offer>> = BTreeMap::new();
        for skipped in &self.skipped {
            by_reason
                .entry(&skipped.reason)
                .or_default()
                .push(&skipped.offer);
        }
        for (reason, offers) in by_reason {
            let first = offers[0];
            let more = match offers.len() {
                1 => String::new(),
                many => format!(" and {} more", many - 1),
            };
            writeln!(
                f,
                "    skipped {} {} in {}{more}: {reason}",
                first.provider, first.instance_type, first.region
            )?;
        }
        self.hints
            .iter()
            .try_for_each(|hint| writeln!(f, "    {hint}"))
    }
}

#[cfg(test)]
mod tests;
