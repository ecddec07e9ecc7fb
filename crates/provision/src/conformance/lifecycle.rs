//! Promises about instances: made once, listed, described, ended for good.

use super::smallest;
use crate::error::Error;
use crate::provider::{InstanceId, InstanceState, Provider};

/// Task files find offers by the provider's name.
pub async fn offers_name_their_provider(provider: &dyn Provider) {
    let offers = provider.offers().await.expect("offers");
    assert!(!offers.is_empty(), "a provider under test needs an offer");
    assert!(offers.iter().all(|offer| offer.provider == provider.name()));
}

/// What was created is never forgotten.
pub async fn created_instances_are_listed(provider: &dyn Provider) {
    let request = smallest(provider, "listed").await;
    let created = provider.create(&request).await.expect("create");
    for near in [None, Some(&request.offer)] {
        let listed = provider.list_owned(near).await.expect("list");
        assert!(
            listed
                .iter()
                .any(|instance| instance.id == created.id && instance.cluster == request.cluster)
        );
    }
}

/// The same token twice is one instance.
pub async fn create_is_idempotent_in_its_token(provider: &dyn Provider) {
    let request = smallest(provider, "twice").await;
    let first = provider.create(&request).await.expect("first");
    let second = provider.create(&request).await.expect("second");
    assert_eq!(first.id, second.id);
    assert_eq!(provider.list_owned(None).await.expect("list").len(), 1);
}

/// The tags of a task are the instance's.
pub async fn labels_are_kept(provider: &dyn Provider) {
    let request = smallest(provider, "labelled").await;
    let created = provider.create(&request).await.expect("create");
    let described = provider.describe(&created.id).await.expect("describe");
    assert!(!request.labels.is_empty());
    assert_eq!(described.labels, request.labels);
}

/// `describe` answers for what `create` made.
pub async fn describe_knows_what_was_created(provider: &dyn Provider) {
    let request = smallest(provider, "described").await;
    let created = provider.create(&request).await.expect("create");
    let described = provider.describe(&created.id).await.expect("describe");
    assert_eq!(
        (described.id, described.cluster),
        (created.id, request.cluster)
    );
}

/// An absent instance is told apart from a failing provider.
pub async fn describe_of_an_absent_instance_is_typed(provider: &dyn Provider) {
    let error = provider
        .describe(&InstanceId("absent".into()))
        .await
        .expect_err("absent");
    assert!(matches!(error, Error::NoSuchInstance { .. }), "{error:?}");
}

/// What was terminated is gone, and nothing else is.
pub async fn terminate_removes_from_the_list(provider: &dyn Provider) {
    let kept = provider
        .create(&smallest(provider, "kept").await)
        .await
        .expect("kept");
    let ended = provider
        .create(&smallest(provider, "ended").await)
        .await
        .expect("ended");
    provider.terminate(&ended.id).await.expect("terminate");
    let listed = provider.list_owned(None).await.expect("list");
    assert_eq!(
        listed
            .iter()
            .map(|instance| &instance.id)
            .collect::<Vec<_>>(),
        [&kept.id]
    );
}

/// Terminating twice is as good as once.
pub async fn terminate_is_idempotent(provider: &dyn Provider) {
    let id = provider
        .create(&smallest(provider, "again").await)
        .await
        .expect("create")
        .id;
    provider.terminate(&id).await.expect("first");
    provider.terminate(&id).await.expect("second");
}

/// Absent is success: the caller wanted it gone.
pub async fn terminate_of_an_absent_instance_succeeds(provider: &dyn Provider) {
    provider
        .terminate(&InstanceId("absent".into()))
        .await
        .expect("absent");
}

/// Where there is stopping: what was stopped is still ours, and starts again.
pub async fn stopped_instances_are_listed_and_start_again(provider: &dyn Provider) {
    let Some(power) = provider.stop_start() else {
        return;
    };
    let created = provider
        .create(&smallest(provider, "stopped").await)
        .await
        .expect("create");
    for _ in 0..2 {
        power.stop(&created.id).await.expect("stop");
    }
    let listed = provider.list_owned(None).await.expect("list");
    assert_eq!(
        listed
            .first()
            .map(|instance| (&instance.id, instance.state)),
        Some((&created.id, InstanceState::Stopped))
    );
    for _ in 0..2 {
        let started = power.start(&created.id).await.expect("start");
        assert_eq!(started.state, InstanceState::Running);
    }
    let absent = InstanceId("absent".into());
    let error = power.stop(&absent).await.expect_err("absent");
    assert!(matches!(error, Error::NoSuchInstance { .. }), "{error:?}");
}
