//! A provider that does not spend more than it may.

use std::time::Duration;

use async_trait::async_trait;

use crate::capability::{Deadline, Ports, SpotMarket, StopStart};
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{CreateRequest, Guards, Instance, InstanceId, Provider};

/// Refuses to create what would bring the sum of all owned instances over a limit.
///
/// The sum is what the provider reports, so instances of earlier runs count, and stopped ones, which may
/// be started again. Two processes that create at the same moment may both pass.
///
/// It stands inside or outside a [`Retry`](crate::Retry): `Retry<Budget<P>>` asks for the sum before
/// every try, `Budget<Retry<P>>` once, and neither counts an instance twice.
#[derive(Debug)]
pub struct Budget<P> {
    inner: P,
    limit_usd_per_hour: f64,
}

impl<P> Budget<P> {
    /// Wraps `inner`.
    pub fn new(inner: P, limit_usd_per_hour: f64) -> Self {
        Self {
            inner,
            limit_usd_per_hour,
        }
    }
}

#[async_trait]
impl<P: Provider> Provider for Budget<P> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn guards(&self) -> Guards {
        self.inner.guards()
    }

    fn settles(&self) -> Duration {
        self.inner.settles()
    }

    async fn offers(&self) -> Result<Vec<Offer>> {
        self.inner.offers().await
    }

    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        let owned = self.inner.list_owned(None).await?;
        // A create whose answer was lost is asked for again: what it made is what is asked for.
        let others = owned
            .iter()
            .filter(|instance| instance.token != request.token);
        let running: f64 = others.map(|instance| instance.usd_per_hour).sum();
        let total_usd_per_hour = running + request.offer.usd_per_hour;
        if total_usd_per_hour > self.limit_usd_per_hour {
            return Err(Error::OverBudget {
                total_usd_per_hour,
                limit_usd_per_hour: self.limit_usd_per_hour,
            });
        }
        self.inner.create(request).await
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.inner.describe(id).await
    }

    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>> {
        self.inner.list_owned(near).await
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.inner.terminate(id).await
    }

    fn stop_start(&self) -> Option<&dyn StopStart> {
        self.inner.stop_start()
    }

    fn spot_market(&self) -> Option<&dyn SpotMarket> {
        self.inner.spot_market()
    }

    fn ports(&self) -> Option<&dyn Ports> {
        self.inner.ports()
    }

    fn deadline(&self) -> Option<&dyn Deadline> {
        self.inner.deadline()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::smallest;
    use crate::fake::{Fake, Fault};
    use crate::{Backoff, Retry};

    #[tokio::test]
    async fn the_second_instance_is_over_the_limit() {
        let provider = Budget::new(Fake::new(), 0.15);
        provider
            .create(&smallest(&provider, "one").await)
            .await
            .expect("0.10 of 0.15");
        let error = provider
            .create(&smallest(&provider, "two").await)
            .await
            .expect_err("0.20");
        assert!(matches!(error, Error::OverBudget { .. }));
        assert_eq!(provider.list_owned(None).await.expect("list").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_retried_create_is_charged_once_in_either_order() {
        let lossy = || {
            let fake = Fake::new();
            fake.fail_next(Fault::AnswerLost);
            fake
        };
        let (limit, backoff) = (0.15, Backoff::default());
        let orders: [Box<dyn Provider>; 2] = [
            Box::new(Retry::new(Budget::new(lossy(), limit), backoff)),
            Box::new(Budget::new(Retry::new(lossy(), backoff), limit)),
        ];
        for provider in orders {
            let request = smallest(provider.as_ref(), "one").await;
            provider.create(&request).await.expect("0.10 of 0.15, once");
            assert_eq!(provider.list_owned(None).await.expect("list").len(), 1);
            let request = smallest(provider.as_ref(), "two").await;
            let error = provider.create(&request).await.expect_err("0.20");
            assert!(matches!(error, Error::OverBudget { .. }), "{error}");
        }
    }
}
