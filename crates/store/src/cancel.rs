//! Asking a running stage to stop.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{Error, Result};

/// A switch shared by those who may ask to stop and those who must. Clones are one switch.
///
/// A stage looks at it between units of work and returns [`Error::Cancelled`]; what it has
/// written stays, and the next run goes on from there.
///
/// ```
/// use updraft_store::CancelToken;
///
/// let cancel = CancelToken::new();
/// assert!(cancel.check().is_ok());
/// cancel.clone().cancel();
/// assert!(cancel.check().is_err());
/// ```
#[derive(Clone, Debug)]
pub struct CancelToken {
    switch: Arc<watch::Sender<bool>>,
}

impl CancelToken {
    /// A switch that is not thrown.
    pub fn new() -> Self {
        Self {
            switch: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Throws the switch, for good.
    pub fn cancel(&self) {
        self.switch.send_replace(true);
    }

    /// Whether the switch is thrown.
    pub fn is_cancelled(&self) -> bool {
        *self.switch.borrow()
    }

    /// `Ok` as long as the switch is not thrown.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once it is.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Waits until the switch is thrown.
    pub async fn cancelled(&self) {
        let mut seen = self.switch.subscribe();
        // An error would mean that the sender is gone, but `self` holds it.
        let _ = seen.wait_for(|cancelled| *cancelled).await;
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiters_wake_before_and_after() {
        let cancel = CancelToken::new();
        let waiter = tokio::spawn({
            let cancel = cancel.clone();
            async move { cancel.cancelled().await }
        });
        tokio::task::yield_now().await;
        cancel.cancel();
        waiter.await.expect("woken");
        cancel.cancelled().await; // already thrown: returns at once
        assert!(matches!(cancel.check(), Err(Error::Cancelled)));
    }
}
