//! Lists of what clouds rent out, read from files or from the small table that comes with the crate.

use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::resources::Accelerator;
use crate::task::edit_distance;

/// Offers of one or several clouds, without asking them.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    offers: Vec<Offer>,
}

/// A line of the built-in table.
type Listed = (
    &'static str,
    &'static str,
    &'static str,
    f64,
    f64,
    &'static str,
    u32,
    f64,
);

/// List prices per hour on demand in AWS us-east-1 and GCP us-central1, for planning without an
/// account: name, vCPUs, GiB, accelerator, its count, USD. A user's own file replaces it.
const BUILT_IN: &[Listed] = &[
    ("aws", "us-east-1", "m6i.large", 2.0, 8.0, "", 0, 0.096),
    ("aws", "us-east-1", "m6i.xlarge", 4.0, 16.0, "", 0, 0.192),
    ("aws", "us-east-1", "m6i.2xlarge", 8.0, 32.0, "", 0, 0.384),
    ("aws", "us-east-1", "g4dn.xlarge", 4.0, 16.0, "T4", 1, 0.526),
    (
        "aws",
        "us-east-1",
        "g4dn.12xlarge",
        48.0,
        192.0,
        "T4",
        4,
        3.912,
    ),
    ("aws", "us-east-1", "g5.xlarge", 4.0, 16.0, "A10G", 1, 1.006),
    (
        "aws",
        "us-east-1",
        "g5.48xlarge",
        192.0,
        768.0,
        "A10G",
        8,
        16.288,
    ),
    ("aws", "us-east-1", "g6.xlarge", 4.0, 16.0, "L4", 1, 0.8048),
    (
        "aws",
        "us-east-1",
        "g6.48xlarge",
        192.0,
        768.0,
        "L4",
        8,
        13.3504,
    ),
    (
        "gcp",
        "us-central1",
        "n2-standard-2",
        2.0,
        8.0,
        "",
        0,
        0.0971,
    ),
    (
        "gcp",
        "us-central1",
        "n2-standard-8",
        8.0,
        32.0,
        "",
        0,
        0.3885,
    ),
    (
        "gcp",
        "us-central1",
        "g2-standard-4",
        4.0,
        16.0,
        "L4",
        1,
        0.7068,
    ),
];

impl Catalog {
    /// The table that comes with the crate.
    pub fn built_in() -> Self {
        let offer =
            |&(provider, region, name, cpus, memory_gib, gpu, count, usd_per_hour): &Listed| {
                Offer {
                    provider: provider.to_owned(),
                    instance_type: name.to_owned(),
                    region: region.to_owned(),
                    zone: None,
                    cpus,
                    memory_gib,
                    disk_gib: None,
                    accelerator: (count > 0).then(|| Accelerator::new(gpu, count)),
                    spot: false,
                    usd_per_hour,
                }
            };
        Self {
            offers: BUILT_IN.iter().map(offer).collect(),
        }
    }

    /// Reads a table in the columns of SkyPilot's catalogue, version 8, as a user has it under
    /// `~/.sky/catalogs/v8/<cloud>/vms.csv`.
    ///
    /// A row with a spot price is two offers. Rows without a price are left out: such a machine
    /// cannot be compared.
    ///
    /// # Errors
    /// [`Error::Catalog`] names the line that lacks a column or has no number where one belongs.
    pub fn from_csv(provider: &str, text: &str) -> Result<Self> {
        let mut lines = text.lines().enumerate();
        let header = lines
            .next()
            .map(|(_, line)| record(line))
            .unwrap_or_default();
        let wrong = |line: usize, what: &str| Error::Catalog {
            provider: provider.to_owned(),
            line: line + 1,
            problem: what.to_owned(),
        };
        let column = |name: &str| header.iter().position(|column| column == name);
        let needed =
            |name: &str| column(name).ok_or_else(|| wrong(0, &format!("no column {name}")));
        let (kind, price) = (needed("InstanceType")?, needed("Price")?);
        let region = needed("Region")?;
        let (gpu, gpus) = (column("AcceleratorName"), column("AcceleratorCount"));
        let (cpus, memory) = (column("vCPUs"), column("MemoryGiB"));
        let (spot, zone) = (column("SpotPrice"), column("AvailabilityZone"));
        let mut offers = Vec::new();
        for (line, text) in lines.filter(|(_, text)| !text.trim().is_empty()) {
            let row = record(text);
            let cell = |column: Option<usize>| {
                column
                    .and_then(|column| row.get(column))
                    .map_or("", String::as_str)
            };
            let number = |column: Option<usize>| match cell(column) {
                "" => Ok(None),
                text => text
                    .parse::<f64>()
                    .map(Some)
                    .map_err(|_| wrong(line, "a number is not one")),
            };
            let count = number(gpus)?.unwrap_or(0.0);
            let name = cell(gpu);
            let offer = |spot: bool, usd_per_hour: f64, instance_type: &str| Offer {
                provider: provider.to_owned(),
                instance_type: instance_type.to_owned(),
                region: cell(Some(region)).to_owned(),
                zone: Some(cell(zone))
                    .filter(|zone| !zone.is_empty())
                    .map(str::to_owned),
                cpus: 0.0,
                memory_gib: 0.0,
                disk_gib: None,
                // Part of an accelerator is offered for tasks that Updraft cannot read.
                accelerator: (!name.is_empty() && count >= 1.0)
                    .then(|| Accelerator::new(name, count as u32)),
                spot,
                usd_per_hour,
            };
            let shape = (number(cpus)?.unwrap_or(0.0), number(memory)?.unwrap_or(0.0));
            for (is_spot, price) in [(false, number(Some(price))?), (true, number(spot)?)] {
                if let Some(price) = price {
                    offers.push(Offer {
                        cpus: shape.0,
                        memory_gib: shape.1,
                        ..offer(is_spot, price, cell(Some(kind)))
                    });
                }
            }
        }
        Ok(Self { offers })
    }

    /// Adds the offers of another: a provider's live answer, or another cloud's file.
    ///
    /// Where both speak of a provider, the other's word replaces this one's.
    pub fn merged(mut self, newer: Vec<Offer>) -> Self {
        let told = |offer: &Offer| newer.iter().any(|new| new.provider == offer.provider);
        self.offers.retain(|offer| !told(offer));
        self.offers.extend(newer);
        self
    }

    /// Everything in it.
    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// The offers, for the planner.
    pub fn into_offers(self) -> Vec<Offer> {
        self.offers
    }
}

/// The accelerators of `offers` that `name` may have meant, nearest first; the exact one, in any
/// case, alone.
pub(crate) fn near_names(name: &str, offers: &[Offer]) -> Vec<String> {
    let mut known: Vec<&str> = offers
        .iter()
        .filter_map(|offer| offer.accelerator.as_ref())
        .map(|accelerator| accelerator.name.as_str())
        .collect();
    known.sort_unstable();
    known.dedup();
    if let Some(exact) = known.iter().find(|known| known.eq_ignore_ascii_case(name)) {
        return vec![(*exact).to_owned()];
    }
    let plain = |name: &str| -> String {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        letters.collect::<String>().to_ascii_lowercase()
    };
    let wanted = plain(name);
    let mut near: Vec<(usize, &str)> = known
        .into_iter()
        .filter_map(|known| {
            let have = plain(known);
            let distance = edit_distance(&wanted, &have);
            let part = have.contains(&wanted) || wanted.contains(&have);
            (part || distance <= 1).then_some((distance, known))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().map(|(_, name)| name.to_owned()).collect()
}

/// The cells of a line; a quoted cell may hold commas and doubled quotes.
fn record(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                cells.last_mut().expect("there is always a cell").push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            '\r' if !quoted => {}
            c => cells.last_mut().expect("there is always a cell").push(c),
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone\n\
        g1,A10G,1.0,4.0,16.0,\"{'Gpus': [{'Name': 'A10G', 'Count': 1}]}\",1.5,0.5,east,east-a\n\
        c1,,,2.0,8.0,,0.1,,east,\n\
        old,,,2.0,8.0,,,,east,\n";

    #[test]
    fn rows_become_offers_on_demand_and_spot() {
        let catalog = Catalog::from_csv("aws", FILE).expect("well formed");
        let got: Vec<_> = catalog
            .offers()
            .iter()
            .map(|offer| (offer.instance_type.as_str(), offer.spot, offer.usd_per_hour))
            .collect();
        assert_eq!(
            got,
            [("g1", false, 1.5), ("g1", true, 0.5), ("c1", false, 0.1)]
        );
        assert_eq!(
            catalog.offers()[0].accelerator,
            Some(Accelerator::new("A10G", 1))
        );
        assert_eq!(catalog.offers()[0].zone.as_deref(), Some("east-a"));
    }

    #[test]
    fn a_wrong_cell_is_named_by_its_line() {
        let error = Catalog::from_csv("aws", &FILE.replace("1.5", "dear")).expect_err("dear");
        assert_eq!(
            error.to_string(),
            "catalogue of aws, line 2: a number is not one"
        );
        let error = Catalog::from_csv("aws", "InstanceType,Region\n").expect_err("no price");
        assert_eq!(
            error.to_string(),
            "catalogue of aws, line 1: no column Price"
        );
    }

    #[test]
    fn a_live_answer_replaces_the_table() {
        let live = Offer {
            instance_type: "live".into(),
            ..Catalog::built_in().offers()[0].clone()
        };
        let merged = Catalog::built_in().merged(vec![live]);
        let aws: Vec<_> = merged
            .offers()
            .iter()
            .filter(|offer| offer.provider == "aws")
            .collect();
        assert_eq!(aws.len(), 1);
        assert!(merged.offers().iter().any(|offer| offer.provider == "gcp"));
    }

    #[test]
    fn names_are_found_by_case_and_by_nearness() {
        let catalog = Catalog::from_csv("aws", FILE).expect("well formed");
        for name in ["a10g", "A10g", "A10", "A-10G", "A11G"] {
            assert_eq!(near_names(name, catalog.offers()), ["A10G"], "{name}");
        }
        assert!(near_names("H100", catalog.offers()).is_empty());
    }
}
