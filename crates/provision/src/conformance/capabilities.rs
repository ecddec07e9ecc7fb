//! Promises about the powers that only some providers have; without a power its promises hold.

use std::time::{Duration, SystemTime};

use super::smallest;
use crate::error::{Error, Result};
use crate::provider::{InstanceId, Provider};

fn is_absent<T>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::NoSuchInstance { .. }))
}

/// The same port twice is one address, and nothing of an absent instance is opened.
pub async fn a_port_has_one_address(provider: &dyn Provider) {
    let Some(power) = provider.ports() else {
        return;
    };
    let request = smallest(provider, "ports").await;
    let id = provider.create(&request).await.expect("create").id;
    let first = power.expose(&id, 8080).await.expect("first");
    assert_eq!(power.expose(&id, 8080).await.expect("second"), first);
    assert_ne!(power.expose(&id, 8081).await.expect("another"), first);
    assert!(is_absent(
        &power.expose(&InstanceId("absent".into()), 8080).await
    ));
}

/// A deadline can be set, moved and taken away, and never for an absent instance.
pub async fn a_deadline_is_set_moved_and_taken_away(provider: &dyn Provider) {
    let Some(power) = provider.deadline() else {
        return;
    };
    let request = smallest(provider, "deadline").await;
    let id = provider.create(&request).await.expect("create").id;
    let later = SystemTime::now() + Duration::from_secs(24 * 3600);
    for at in [Some(later), Some(later + Duration::from_secs(60)), None] {
        power.set_deadline(&id, at).await.expect("set");
    }
    provider.describe(&id).await.expect("still there");
    let absent = InstanceId("absent".into());
    assert!(is_absent(&power.set_deadline(&absent, Some(later)).await));
}

/// What runs, and what its owner has ended, was not taken back.
pub async fn what_the_owner_ended_was_not_preempted(provider: &dyn Provider) {
    let Some(market) = provider.spot_market() else {
        return;
    };
    let request = smallest(provider, "spot").await;
    let id = provider.create(&request).await.expect("create").id;
    assert!(!market.was_preempted(&id).await.expect("runs"));
    provider.terminate(&id).await.expect("terminate");
    assert!(!market.was_preempted(&id).await.expect("ended"));
    let absent = InstanceId("absent".into());
    assert!(!market.was_preempted(&absent).await.expect("absent"));
}
