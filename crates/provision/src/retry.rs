//! A provider that tries again.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use crate::capability::{Deadline, Ports, SpotMarket, StopStart};
use crate::error::{Error, Result};
use crate::offer::Offer;
use crate::provider::{CreateRequest, Guards, Instance, InstanceId, Provider};

/// How often, and how far apart, calls are tried.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The number of tries, the first included.
    pub max_tries: u32,
    /// The pause after the first try; it doubles after each.
    pub initial: Duration,
    /// The longest pause.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            max_tries: 5,
            initial: Duration::from_millis(500),
            max: Duration::from_secs(30),
        }
    }
}

impl Backoff {
    /// The pause after the `n`-th failed try, from 1; `None` when there is no further try.
    pub fn pause_after(&self, n: u32) -> Option<Duration> {
        let doubled = self
            .initial
            .saturating_mul(1_u32.checked_shl(n.saturating_sub(1)).unwrap_or(u32::MAX));
        (n < self.max_tries).then(|| doubled.min(self.max))
    }
}

/// Tries the calls of `P` again while their errors are retryable.
///
/// Safe because every verb of [`Provider`] is idempotent.
#[derive(Debug)]
pub struct Retry<P> {
    inner: P,
    backoff: Backoff,
}

impl<P> Retry<P> {
    /// Wraps `inner`.
    pub fn new(inner: P, backoff: Backoff) -> Self {
        Self { inner, backoff }
    }

    async fn attempt<T, F: Future<Output = Result<T>>>(
        &self,
        mut call: impl FnMut() -> F,
    ) -> Result<T> {
        for n in 1.. {
            let error = match call().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match self.backoff.pause_after(n).filter(|_| error.is_retryable()) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(error),
            }
        }
        unreachable!("the loop ends when `pause_after` does")
    }
}

#[async_trait]
impl<P: Provider> Provider for Retry<P> {
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
        self.attempt(|| self.inner.offers()).await
    }

    /// A refusal after a try that was not answered does not say that nothing was made: then the error
    /// is [`Error::Unavailable`], with the refusal as its cause.
    async fn create(&self, request: &CreateRequest) -> Result<Instance> {
        let unanswered = AtomicBool::new(false);
        let created = self.attempt(|| async {
            let created = self.inner.create(request).await;
            if let Err(Error::Unavailable { .. }) = created {
                unanswered.store(true, Ordering::Relaxed);
            }
            created
        });
        match created.await {
            Err(error @ Error::Unavailable { .. }) => Err(error),
            Err(error) if unanswered.into_inner() => Err(Error::Unavailable {
                provider: self.inner.name(),
                operation: "create",
                source: error.into(),
            }),
            answer => answer,
        }
    }

    async fn describe(&self, id: &InstanceId) -> Result<Instance> {
        self.attempt(|| self.inner.describe(id)).await
    }

    async fn list_owned(&self, near: Option<&Offer>) -> Result<Vec<Instance>> {
        self.attempt(|| self.inner.list_owned(near)).await
    }

    async fn terminate(&self, id: &InstanceId) -> Result<()> {
        self.attempt(|| self.inner.terminate(id)).await
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

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_makes_one_instance() {
        let fake = Fake::new();
        fake.fail_next(Fault::AnswerLost);
        fake.fail_next(Fault::AnswerLost);
        let provider = Retry::new(fake, Backoff::default());
        let request = smallest(&provider, "lost").await;
        provider.create(&request).await.expect("third try");
        assert_eq!(provider.list_owned(None).await.expect("list").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_succeed_is_not_tried_again() {
        let fake = Fake::new();
        fake.fail_next(Fault::Refused(Error::Unauthenticated {
            provider: "fake",
            source: "no".into(),
        }));
        let provider = Retry::new(fake, Backoff::default());
        let request = smallest(&provider, "refused").await;
        let error = provider.create(&request).await.expect_err("refused");
        assert!(matches!(error, Error::Unauthenticated { .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_after_a_lost_answer_is_no_proof() {
        let fake = Fake::new();
        fake.fail_next(Fault::AnswerLost);
        fake.fail_next(Fault::Refused(Error::Quota {
            provider: "fake",
            instance_type: "small".into(),
            region: "fake-1".into(),
        }));
        let provider = Retry::new(fake, Backoff::default());
        let request = smallest(&provider, "unknown").await;
        let error = provider.create(&request).await.expect_err("refused");
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        assert_eq!(provider.list_owned(None).await.expect("list").len(), 1);
    }

    #[test]
    fn pauses_double_up_to_the_limit_and_end() {
        let backoff = Backoff {
            max_tries: 5,
            initial: Duration::from_secs(1),
            max: Duration::from_secs(3),
        };
        let pauses: Vec<_> = (1..=5)
            .map(|n| backoff.pause_after(n).map(|p| p.as_secs()))
            .collect();
        assert_eq!(pauses, [Some(1), Some(2), Some(3), Some(3), None]);
    }
}
