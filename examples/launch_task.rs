//! Launching a task, flat: the recipe to fork.
//!
//!     cargo run --release --example launch_task
//!
//! Reads a SkyPilot task file, says why it runs where it runs, launches it on this machine, follows its
//! output, and takes everything down. It needs nothing but `bash`. A task for a machine of yours says
//! `cloud: ssh`; the provider beside it is then `SshProvider`.

#![expect(clippy::print_stdout, reason = "a program talks to a person")]

use std::sync::Arc;

use anyhow::{Result, bail};
use updraft::provision::providers::local::LocalProvider;
use updraft::provision::{
    EnvOverrides, JobStatus, LaunchOptions, Lease, Plan, Provider, Task, launch,
};

const TASK: &str = r#"
name: letters

resources:
  cloud: local
  cpus: 1+

envs:
  WORD: strawberry
  LETTER:            # no value: whoever launches it must give one

setup: |
  echo "a letter on each line" > how

run: |
  cat how
  grep -o . <<< "$WORD" | grep --line-number "$LETTER"
  echo "node $SKYPILOT_NODE_RANK of $SKYPILOT_NUM_NODES is done"
"#;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // 1. The task file, with what it leaves open.
    let task = Task::from_yaml(TASK, &EnvOverrides::new().with("LETTER", "r"))?;

    // 2. Who rents out machines: here, this one. Its instances are folders.
    let state = tempfile::tempdir()?;
    let provider = Arc::new(LocalProvider::new(state.path())?);

    // 3. Where it would run, best first, and why nothing else will do.
    let plan = Plan::for_task(&task, provider.offers().await?);
    print!("{plan}");

    // 4. An instance. A second launch under the same name would find the first one's.
    let options = LaunchOptions {
        cluster: "demo".into(),
        lease: Lease::default(),
    };
    let cluster = launch(provider.clone(), &task, &options).await?;

    // 5. Setup, then run, line by line as they are written.
    let mut job = cluster.exec(&task).await?;
    while let Some(line) = job.next_line().await? {
        println!("  {}", line.text);
    }
    let status = job.wait().await?;

    // 6. The end of the instance and of everything on it, whatever the job has come to.
    cluster.down().await?;
    assert!(provider.list_owned(None).await?.is_empty());
    if status != JobStatus::Succeeded {
        bail!("the job ended with {status:?}");
    }
    println!("nothing is left");
    Ok(())
}
