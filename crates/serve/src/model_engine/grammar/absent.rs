//! A build without feature `constrained`: there are no grammars.

use updraft_chat::Chat;

use crate::constraint::Constraint;
use crate::error::{Error, Result};

/// Refuses every constraint.
#[derive(Debug)]
pub(in super::super) struct Grammars;

/// None exists.
#[derive(Debug, Clone)]
pub(in super::super) enum Grammar {}

impl Grammars {
    pub(in super::super) fn new(_: &Chat, _: usize) -> Self {
        Self
    }

    pub(in super::super) async fn compile(&self, _: Constraint) -> Result<Grammar> {
        let message = "this server was built without feature `constrained`; leave it out";
        Err(Error::invalid("response_format", message))
    }
}

impl Grammar {
    pub(in super::super) fn mask(&mut self, _: &[f32], _: &[u32]) -> Result<Vec<f32>> {
        match *self {}
    }

    pub(in super::super) fn accept(&mut self, _: u32) -> Result<()> {
        match *self {}
    }

    pub(in super::super) fn is_over(&self) -> bool {
        match *self {}
    }
}
