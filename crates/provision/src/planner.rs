//! From offers to an ordered list of candidates: a pure function that can explain itself.

use std::fmt;

use crate::offer::Offer;
use crate::resources::{Accelerators, Resources};

/// The candidates for a task, best first, and why the others are none.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// What to try, in this order.
    pub candidates: Vec<Offer>,
    /// What was passed over, with the first reason that excluded it.
    pub skipped: Vec<Skipped>,
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
/// An accelerator list is an order whatever the price; a set is the cheapest of any.
pub fn plan(resources: &Resources, offers: Vec<Offer>) -> Plan {
    let mut ranked = Vec::new();
    let mut skipped = Vec::new();
    for offer in offers {
        match rank(resources, &offer) {
            Ok(preference) => ranked.push((preference, offer)),
            Err(reason) => skipped.push(Skipped { offer, reason }),
        }
    }
    // A stable sort: equal offers keep the provider's order.
    ranked.sort_by(|(pa, a), (pb, b)| pa.cmp(pb).then(a.usd_per_hour.total_cmp(&b.usd_per_hour)));
    Plan {
        candidates: ranked.into_iter().map(|(_, offer)| offer).collect(),
        skipped,
    }
}

/// The offer's place in the task's order of accelerators, or why it does not fit.
fn rank(resources: &Resources, offer: &Offer) -> Result<usize, String> {
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
    if offer.spot != resources.use_spot {
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

impl fmt::Display for Plan {
    /// A table of candidates with their prices, then what was skipped and why.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, offer) in self.candidates.iter().enumerate() {
            let accelerator = offer
                .accelerator
                .as_ref()
                .map_or("-".to_owned(), ToString::to_string);
            writeln!(
                f,
                "{:>2}. {:<10} {:<16} {:<12} {:>4} cpus {:>5.0} GiB {:<12} {:>8.2} USD/h",
                index + 1,
                offer.provider,
                offer.instance_type,
                offer.region,
                offer.cpus,
                offer.memory_gib,
                accelerator,
                offer.usd_per_hour,
            )?;
        }
        self.skipped
            .iter()
            .try_for_each(|skipped| writeln!(f, "    skipped {skipped}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{Accelerator, Amount};

    fn offer(name: &str, accelerator: Option<&str>, usd_per_hour: f64) -> Offer {
        Offer {
            provider: "fake".into(),
            instance_type: name.into(),
            region: "here".into(),
            zone: None,
            cpus: 4.0,
            memory_gib: 16.0,
            accelerator: accelerator.map(|name| Accelerator {
                name: name.into(),
                count: 1,
            }),
            spot: false,
            usd_per_hour,
        }
    }

    fn one(name: &str) -> Accelerator {
        Accelerator {
            name: name.into(),
            count: 1,
        }
    }

    fn check(accelerators: Accelerators, expected: &[&str]) {
        let offers = vec![
            offer("a", Some("A100"), 3.0),
            offer("l", Some("L4"), 1.0),
            offer("c", None, 0.1),
        ];
        let resources = Resources {
            accelerators,
            ..Resources::default()
        };
        let plan = plan(&resources, offers);
        let got: Vec<_> = plan
            .candidates
            .iter()
            .map(|offer| offer.instance_type.as_str())
            .collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn a_list_is_an_order_whatever_the_price() {
        check(
            Accelerators::Ordered(vec![one("a100"), one("L4")]),
            &["a", "l"],
        );
    }

    #[test]
    fn a_set_is_the_cheapest_of_any() {
        check(
            Accelerators::AnyOf(vec![one("A100"), one("l4")]),
            &["l", "a"],
        );
    }

    #[test]
    fn no_accelerator_asked_for_means_cheapest_of_all() {
        check(Accelerators::None, &["c", "l", "a"]);
    }

    #[test]
    fn every_skipped_offer_has_its_reason() {
        let resources = Resources {
            cpus: Some(Amount {
                value: 8.0,
                or_more: true,
            }),
            ..Resources::default()
        };
        let plan = plan(&resources, vec![offer("c", None, 0.1)]);
        assert!(plan.candidates.is_empty());
        assert_eq!(
            plan.skipped[0].to_string(),
            "fake c in here: has 4 cpus, the task asks for 8+"
        );
    }
}
