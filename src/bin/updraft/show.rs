//! Verbs about clusters and providers: what there is, what it costs, ending it.

use std::process::ExitCode;
use std::time::SystemTime;

use updraft::provision::providers::ssh::forget_alias;
use updraft::provision::{ClusterReport, InstanceState, NodeState};

use crate::screen::Screen;
use crate::{Outcome, world};

type Error = Box<dyn std::error::Error>;

pub(crate) async fn status(refresh: bool, json: bool, screen: &Screen) -> Result<(), Error> {
    let reports = world::engine()?.status(refresh).await?;
    if json {
        let clusters: Vec<_> = reports.iter().map(as_json).collect();
        screen.say(&serde_json::to_string(&clusters)?);
        return Ok(());
    }
    if reports.is_empty() {
        screen.note("no clusters");
        return Ok(());
    }
    let rows: Vec<_> = reports
        .iter()
        .map(|report| {
            let first = report.nodes.first().map(|(node, _)| &node.offer);
            vec![
                report.row.name.clone(),
                status_word(report),
                first.map_or("-".to_owned(), |offer| {
                    format!(
                        "{}x {} {}",
                        report.row.num_nodes, offer.provider, offer.instance_type
                    )
                }),
                autostop_word(report),
                report.row.task.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    screen.table(&["NAME", "STATUS", "RESOURCES", "AUTOSTOP", "TASK"], &rows);
    Ok(())
}

fn status_word(report: &ClusterReport) -> String {
    let word = serde_json::to_value(report.row.status).unwrap_or_default();
    word.as_str().unwrap_or_default().to_owned()
}

fn autostop_word(report: &ClusterReport) -> String {
    match report.row.lease.idle {
        None => "-".to_owned(),
        Some(idle) if report.row.lease.down => format!("{}m (down)", idle.as_secs() / 60),
        Some(idle) => format!("{}m", idle.as_secs() / 60),
    }
}

fn as_json(report: &ClusterReport) -> serde_json::Value {
    let nodes: Vec<_> = report
        .nodes
        .iter()
        .map(|(node, instance)| {
            let state = instance.as_ref().map(|instance| match instance.state {
                InstanceState::Starting => "starting",
                InstanceState::Running => "running",
                InstanceState::Stopped => "stopped",
                InstanceState::Terminating => "terminating",
            });
            serde_json::json!({
                "rank": node.node_rank,
                "provider": node.provider,
                "instance": node.instance.as_ref().map(ToString::to_string),
                "offer": node.offer,
                "state": state,
            })
        })
        .collect();
    serde_json::json!({
        "name": report.row.name,
        "status": report.row.status,
        "task": report.row.task,
        "num_nodes": report.row.num_nodes,
        "autostop_minutes": report.row.lease.idle.map(|idle| idle.as_secs() / 60),
        "down": report.row.lease.down,
        "nodes": nodes,
    })
}

pub(crate) async fn stop(clusters: &[String], json: bool, screen: &Screen) -> Result<(), Error> {
    let engine = world::engine()?;
    let mut outcomes = Vec::new();
    for cluster in clusters {
        let stopped = engine.stop(cluster).await;
        outcomes.push((cluster, stopped.map_err(Error::from)));
    }
    tell_all(outcomes, "STOPPED", json, screen)
}

pub(crate) async fn start(clusters: &[String], json: bool, screen: &Screen) -> Result<(), Error> {
    let (engine, agent) = (world::engine()?, world::agent()?);
    let mut outcomes = Vec::new();
    for cluster in clusters {
        let started = async {
            engine.start(cluster).await?;
            engine.guard(cluster, &agent).await
        };
        outcomes.push((cluster, started.await.map_err(Error::from)));
    }
    tell_all(outcomes, "UP", json, screen)
}

pub(crate) async fn down(
    clusters: &[String],
    purge: bool,
    yes: bool,
    json: bool,
    screen: &Screen,
) -> Result<(), Error> {
    let question = match purge {
        false => format!("end {} and everything on it?", clusters.join(", ")),
        true => format!(
            "forget {} without ending what may still run there?",
            clusters.join(", ")
        ),
    };
    if !yes && !screen.agrees(&question) {
        return Err("nothing was ended".into());
    }
    let engine = world::engine()?;
    let mut outcomes = Vec::new();
    for cluster in clusters {
        let mut gone = engine.down(cluster).await;
        if let (Err(error), true) = (&gone, purge) {
            screen.note(&format!(
                "warning: `{cluster}` is forgotten, not ended: {error}"
            ));
            gone = engine.purge(cluster);
        }
        if gone.is_ok() {
            gone = forget_alias(&world::home().join("ssh"), cluster);
        }
        outcomes.push((cluster, gone.map_err(Error::from)));
    }
    tell_all(outcomes, "GONE", json, screen)
}

/// What has become of each of several names, every one of which was tried.
pub(crate) fn tell_all(
    mut outcomes: Vec<(&String, Result<(), Error>)>,
    status: &str,
    json: bool,
    screen: &Screen,
) -> Result<(), Error> {
    if let [(name, outcome)] = outcomes.as_mut_slice() {
        std::mem::replace(outcome, Ok(()))?;
        said(name, status, json, screen);
        return Ok(());
    }
    let (mut failed, all) = (0, outcomes.len());
    for (name, outcome) in outcomes {
        match outcome {
            Ok(()) => said(name, status, json, screen),
            Err(error) => {
                failed += 1;
                screen.note(&format!("`{name}`:"));
                screen.fail(error.as_ref());
            }
        }
    }
    match failed {
        0 => Ok(()),
        _ => Err(format!(
            "{failed} of {all} are not {}; run it again",
            status.to_lowercase()
        )
        .into()),
    }
}

/// What a cluster is now: an object a line for programs.
pub(crate) fn said(name: &str, status: &str, json: bool, screen: &Screen) {
    let told = serde_json::json!({"name": name, "status": status});
    let words = format!("`{name}` is {}", status.to_lowercase());
    screen.done(json, &told, &words);
}

pub(crate) async fn check(json: bool, screen: &Screen) -> Outcome {
    let answers = world::engine()?.check().await;
    let is_usable = |answer: &Result<usize, updraft::provision::Error>| matches!(answer, Ok(1..));
    if json {
        let lines: Vec<_> = answers
            .iter()
            .map(|(name, answer)| {
                serde_json::json!({
                    "provider": name,
                    "usable": is_usable(answer),
                    "offers": answer.as_ref().ok(),
                    "error": answer.as_ref().err().map(ToString::to_string),
                })
            })
            .collect();
        screen.say(&serde_json::to_string(&lines)?);
    } else {
        let rows: Vec<_> = answers
            .iter()
            .map(|(name, answer)| {
                let said = match answer {
                    Ok(0) => "nothing to offer".to_owned(),
                    Ok(1) => "1 offer".to_owned(),
                    Ok(offers) => format!("{offers} offers"),
                    Err(error) => error.to_string(),
                };
                vec![
                    (*name).to_owned(),
                    if is_usable(answer) { "yes" } else { "no" }.to_owned(),
                    said,
                ]
            })
            .collect();
        screen.table(&["PROVIDER", "USABLE", "SAYS"], &rows);
    }
    let any = answers.iter().any(|(_, answer)| is_usable(answer));
    Ok(if any {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

pub(crate) async fn gpus(json: bool, screen: &Screen) -> Result<(), Error> {
    let live = world::engine()?.offers().await;
    let mut offers = world::catalog()?.merged(live).into_offers();
    offers.retain(|offer| offer.accelerator.is_some());
    offers.sort_by(|a, b| a.usd_per_hour.total_cmp(&b.usd_per_hour));
    if json {
        screen.say(&serde_json::to_string(&offers)?);
        return Ok(());
    }
    let rows: Vec<_> = offers
        .iter()
        .map(|offer| {
            vec![
                offer
                    .accelerator
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
                offer.provider.clone(),
                offer.instance_type.clone(),
                offer.zone.clone().unwrap_or_else(|| offer.region.clone()),
                if offer.spot { "spot" } else { "on demand" }.to_owned(),
                format!("{:.4}", offer.usd_per_hour),
            ]
        })
        .collect();
    screen.table(
        &["GPUS", "CLOUD", "TYPE", "WHERE", "MARKET", "USD/H"],
        &rows,
    );
    Ok(())
}

pub(crate) fn cost_report(json: bool, screen: &Screen) -> Result<(), Error> {
    let lines = world::engine()?.cost_report(SystemTime::now())?;
    if json {
        screen.say(&serde_json::to_string(&lines)?);
        return Ok(());
    }
    let rows: Vec<_> = lines
        .iter()
        .map(|line| {
            vec![
                line.cluster.clone(),
                format!("{}x {}", line.instances, line.instance_type),
                match (line.running, line.stopped) {
                    (true, _) => "runs",
                    (false, true) => "stopped",
                    (false, false) => "ended",
                }
                .to_owned(),
                format!("{:.2}", line.hours),
                format!("{:.2}", line.usd),
            ]
        })
        .collect();
    screen.table(&["CLUSTER", "INSTANCES", "STATE", "HOURS", "USD"], &rows);
    Ok(())
}

pub(crate) async fn gc(json: bool, screen: &Screen) -> Result<(), Error> {
    let engine = world::engine()?;
    let ended = engine.gc().await?;
    let ids: Vec<_> = ended
        .iter()
        .map(|instance| instance.id.to_string())
        .collect();
    // Their calls to create were never answered, and their providers' lists have not settled.
    let open = engine.state().open_nodes()?;
    let unknown = open
        .iter()
        .filter(|node| matches!(node.state, NodeState::Abandoned | NodeState::Ending))
        .count();
    if unknown > 0 {
        screen.note(&format!("{unknown} may still appear; run `gc` again later"));
    }
    if json {
        screen.say(&serde_json::to_string(&ids)?);
    } else if ids.is_empty() {
        screen.note("nothing was forgotten");
    } else {
        screen.say(&format!("ended {}", ids.join(", ")));
    }
    Ok(())
}
