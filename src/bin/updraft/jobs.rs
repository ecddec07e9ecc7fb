//! Verbs about the jobs of a cluster.

use std::process::ExitCode;

use updraft::provision::{JobId, Lease};

use crate::launch::follow;
use crate::screen::Screen;
use crate::{Outcome, world};

type Error = Box<dyn std::error::Error>;

pub(crate) async fn queue(cluster: &str, json: bool, screen: &Screen) -> Result<(), Error> {
    let jobs = world::engine()?.queue(cluster, &world::agent()?).await?;
    if json {
        screen.say(&serde_json::to_string(&jobs)?);
        return Ok(());
    }
    let rows: Vec<_> = jobs
        .iter()
        .rev()
        .map(|job| {
            let seconds = job
                .started
                .zip(job.ended)
                .map(|(started, ended)| format!("{} s", ended - started));
            vec![
                job.id.to_string(),
                job.name.clone().unwrap_or_else(|| "-".to_owned()),
                job.status.word().to_owned(),
                seconds.unwrap_or_else(|| "-".to_owned()),
                job.exit_code
                    .map_or("-".to_owned(), |code| code.to_string()),
            ]
        })
        .collect();
    screen.table(&["ID", "NAME", "STATUS", "TOOK", "EXIT"], &rows);
    Ok(())
}

pub(crate) async fn logs(
    cluster: &str,
    job: Option<i64>,
    to_end: bool,
    screen: &Screen,
) -> Outcome {
    let (engine, agent) = (world::engine()?, world::agent()?);
    let newest = engine
        .queue(cluster, &agent)
        .await?
        .last()
        .map(|job| job.id);
    let job = job.or(newest).ok_or("no job was submitted yet")?;
    if to_end {
        return follow(&engine, &agent, cluster, JobId(job), screen).await;
    }
    let mut logs = engine
        .logs(cluster, &agent, Some(JobId(job)), false)
        .await?;
    while let Some(line) = logs.next_line().await? {
        screen.line(&line);
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn cancel(
    cluster: &str,
    job: Option<i64>,
    json: bool,
    screen: &Screen,
) -> Result<(), Error> {
    let count = world::engine()?
        .cancel(cluster, &world::agent()?, job.map(JobId))
        .await?;
    if count == 0 && job.is_some() {
        return Err("there is no such job, or it has ended".into());
    }
    let told = serde_json::json!({"cluster": cluster, "cancelled": count});
    screen.done(json, &told, &format!("{count} to cancel on `{cluster}`"));
    Ok(())
}

pub(crate) async fn autostop(
    cluster: &str,
    lease: Lease,
    json: bool,
    screen: &Screen,
) -> Result<(), Error> {
    world::engine()?
        .autostop(cluster, &world::agent()?, lease)
        .await?;
    let minutes = lease.idle.map(|idle| idle.as_secs() / 60);
    let words = match minutes {
        Some(minutes) if lease.down => {
            format!("`{cluster}` goes down after {minutes} idle minutes")
        }
        Some(minutes) => format!("`{cluster}` stops after {minutes} idle minutes"),
        None => format!("`{cluster}` stays until it is stopped or taken down"),
    };
    let told = serde_json::json!({
        "cluster": cluster,
        "autostop_minutes": minutes,
        "down": lease.down,
        "wait_for": lease.wait_for,
    });
    screen.done(json, &told, &words);
    Ok(())
}
