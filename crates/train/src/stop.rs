//! Whether somebody asked to stop, while something other than a step is under way.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;

use tokio::runtime::Handle;
use updraft_store::CancelToken;

use crate::{Error, Result};

/// The switches of those who may ask.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    switches: Vec<CancelToken>,
    /// Optimizer steps done by then.
    step: u64,
}

impl Stop {
    pub(crate) fn new(switches: &[CancelToken], step: u64) -> Self {
        Self {
            switches: switches.to_vec(),
            step,
        }
    }

    pub(crate) fn switches(&self) -> &[CancelToken] {
        &self.switches
    }

    /// `Ok` as long as nobody asked.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(crate) fn check(&self) -> Result<()> {
        match self.switches.iter().any(CancelToken::is_cancelled) {
            true => Err(Error::Cancelled { step: self.step }),
            false => Ok(()),
        }
    }

    /// Waits for work, or drops it when somebody asks.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; else the work's own.
    pub(crate) async fn race<R, E>(&self, work: impl Future<Output = Result<R, E>>) -> Result<R>
    where
        Error: From<E>,
    {
        let asked = self.switches.iter().map(CancelToken::cancelled);
        let mut asked: Vec<Pin<Box<_>>> = asked.map(Box::pin).collect();
        let mut work = pin!(work);
        poll_fn(|context| {
            let mut asked = asked.iter_mut();
            if asked.any(|asked| asked.as_mut().poll(context).is_ready()) {
                return Poll::Ready(Err(Error::Cancelled { step: self.step }));
            }
            work.as_mut().poll(context).map_err(Error::from)
        })
        .await
    }

    /// [`race`](Self::race) from outside of the runtime.
    ///
    /// # Errors
    /// As [`race`](Self::race).
    pub(crate) fn wait<R, E>(
        &self,
        runtime: &Handle,
        work: impl Future<Output = Result<R, E>>,
    ) -> Result<R>
    where
        Error: From<E>,
    {
        runtime.block_on(self.race(work))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_waited_for_is_dropped_once_any_switch_is_thrown() {
        let switches = [CancelToken::new(), CancelToken::new()];
        let stop = Stop::new(&switches, 7);
        let done = stop.race(async { Ok::<_, Error>(3) }).await;
        assert_eq!(done.expect("nobody asked"), 3);
        stop.check().expect("nobody asked");
        let endless = stop.race(std::future::pending::<Result<()>>());
        let (outcome, ()) = tokio::join!(endless, async { switches[1].cancel() });
        for outcome in [outcome, stop.check()] {
            let error = outcome.expect_err("asked");
            assert!(matches!(error, Error::Cancelled { step: 7 }), "{error}");
        }
    }
}
