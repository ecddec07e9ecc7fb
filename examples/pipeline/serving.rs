//! The serve task's work: the base model and the fine-tuned one behind one URL.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use updraft::model::{Compute, Threads};
use updraft::serve::{
    Engine, EngineOptions, Engines, ModelEngine, ModelSource, ServeOptions, listen, serve,
};
use updraft::store::Store;

use crate::settings::Settings;
use crate::work::available_threads;

/// The name under which the fine-tuned model is served; the base has its own.
pub fn tuned_name(settings: &Settings) -> String {
    format!("{}/{}", settings.model_name(), settings.dataset_name())
}

pub async fn run(settings: &Settings) -> Result<()> {
    let host = settings
        .host
        .parse()
        .with_context(|| format!("--host {} is no IP address", settings.host))?;
    let listener = listen(SocketAddr::new(host, settings.port.unwrap_or(30001))).await?;
    let store = Store::open(&settings.store)?;
    let (base, tuned) = (settings.model_name(), tuned_name(settings));
    let (tuned_engine, base_engine) = tokio::try_join!(
        load(&store, &tuned, format!("done/{tuned}"), settings.device),
        load(&store, &base, format!("models/{base}"), settings.device),
    )?;
    let engines: Vec<Arc<dyn Engine>> = vec![Arc::new(tuned_engine), Arc::new(base_engine)];
    println!(
        "serving {tuned} and {base} at http://{}/v1",
        listener.local_addr()?
    );
    serve(
        listener,
        Arc::new(Engines::new(engines)?),
        ServeOptions::default(),
        ended()?,
    )
    .await;
    Ok(())
}

async fn load(store: &Store, name: &str, stage: String, device: Compute) -> Result<ModelEngine> {
    let threads = Threads::new(available_threads()).context("could not start threads")?;
    let options = EngineOptions {
        kv_cache_bytes: Some(64 << 20),
        ..EngineOptions::for_compute(device)
    };
    Ok(ModelEngine::load(
        name,
        &ModelSource::stage(store, stage),
        &[],
        &threads,
        &options,
    )
    .await?)
}

/// Resolves when the service is told to stop.
fn ended() -> Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    })
}
