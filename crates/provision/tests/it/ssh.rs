//! Machines over ssh keep the promises that every provider and transport keeps.

use updraft_provision::providers::ssh::{SshProvider, SshTransport};
use updraft_provision::{Error, HostTransport, Provider, conformance};

use crate::sshd::machines;

mod provider {
    use super::*;

    updraft_provision::provider_conformance_tests!(
        else_return,
        machines(2).map(|machines| (SshProvider::new(machines.hosts.clone()), machines))
    );
}

mod transport {
    use super::*;

    updraft_provision::transport_conformance_tests!(
        else_return,
        machines(1).map(|machines| {
            let target = machines.hosts[0].target.clone();
            (SshTransport::new(target, "instance"), machines)
        })
    );
}

#[tokio::test]
async fn a_machine_whose_key_is_not_pinned_is_refused() {
    let Some(machines) = machines(2) else { return };
    let mut target = machines.hosts[0].target.clone();
    let empty = tempfile::NamedTempFile::new().expect("file");
    target.known_hosts = Some(empty.path().to_owned());
    let transport = SshTransport::new(target, "instance");
    let command = updraft_provision::ShellCommand::default();
    let error = transport.start(&command).await.expect_err("unknown key");
    assert!(matches!(error, Error::Transport { .. }), "{error:?}");
}

#[tokio::test]
async fn a_machine_is_given_to_one_at_a_time() {
    let Some(machines) = machines(1) else { return };
    let provider = SshProvider::new(machines.hosts.clone());
    let first = conformance::smallest(&provider, "first").await;
    let second = conformance::smallest(&provider, "second").await;
    let taken = provider.create(&first).await.expect("free");
    let error = provider.create(&second).await.expect_err("taken");
    assert!(matches!(error, Error::NoCapacity { .. }), "{error:?}");
    provider.terminate(&taken.id).await.expect("given back");
    provider.create(&second).await.expect("free again");
}

/// One machine that is switched off hides itself, and nothing of the others.
#[tokio::test]
async fn a_machine_that_is_off_does_not_stand_in_the_others_way() {
    let Some(mut machines) = machines(2) else {
        return;
    };
    machines.stop(1);
    let provider = SshProvider::new(machines.hosts.clone());
    let offers = provider.offers().await.expect("offers");
    let [here] = offers.as_slice() else {
        panic!("{offers:?}");
    };
    let request = conformance::smallest(&provider, "here").await;
    let taken = provider.create(&request).await.expect("create");
    for near in [None, Some(here)] {
        let listed = provider.list_owned(near).await.expect("list");
        assert_eq!(listed, std::slice::from_ref(&taken));
    }
    let mut off = here.clone();
    off.instance_type = format!(
        "127.0.0.1:{}",
        machines.hosts[1].target.port.unwrap_or_default()
    );
    let error = provider
        .list_owned(Some(&off))
        .await
        .expect_err("silence is no proof");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
}

/// The server is gone and comes back: the same transport goes on.
#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let Some(mut machines) = machines(1) else {
        return;
    };
    let transport = SshTransport::new(machines.hosts[0].target.clone(), "instance");
    let ask = || async {
        let command = updraft_provision::ShellCommand {
            script: "echo here".into(),
            ..updraft_provision::ShellCommand::default()
        };
        let mut process = transport.start(&command).await?;
        Ok::<_, Error>(process.lines.recv().await.map(|line| line.text))
    };
    assert_eq!(ask().await.expect("first").as_deref(), Some("here"));
    machines.cut(0);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    // The connection ends when its server does, which the client learns a moment later.
    while ask().await.ok().flatten().as_deref() != Some("here") {
        assert!(std::time::Instant::now() < deadline, "it never came back");
    }
}
