//! The loss curve of the newest training run, from its log in the store.

use anyhow::{Context, Result};
use updraft::store::{StageId, Store, current};
use updraft::train::StepRecord;
use updraft::train::metrics::{parse_log, sparkline};

use crate::settings::Settings;

const WIDTH: usize = 60;

/// Prints the curve and says where its picture lies.
pub async fn show(settings: &Settings) -> Result<()> {
    let store = Store::open(&settings.store)?;
    let id = StageId::done(&settings.model_name(), &settings.dataset_name())?;
    let stage = current(&store, &id)
        .await?
        .with_context(|| format!("{} is not there", id.current_path()))?;
    let log = store
        .get(&stage.path("loss.jsonl"))
        .await?
        .context("the run has no loss log")?;
    let log: Vec<StepRecord> = parse_log(&log)?;
    let losses: Vec<f64> = log.iter().map(|record| record.loss).collect();
    if let (Some(first), Some(last)) = (losses.first(), losses.last()) {
        println!("loss {first:.3} {} {last:.3}", sparkline(&losses, WIDTH));
        println!("     picture: {}", store.url_of(&stage.path("loss.svg")));
    }
    Ok(())
}
