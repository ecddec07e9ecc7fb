//! Which of a conversation's bytes the loss counts, once its turns are found.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::message::{Message, Role};

/// What is trained of conversations that do not say it themselves, by axolotl's names.
///
/// A message's own `weight` and `train_detail` come first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossOptions {
    /// The roles whose messages are trained: the assistant's, unless said otherwise.
    pub roles_to_train: Vec<Role>,
    /// Which turns' ends are trained.
    pub train_on_eos: TrainOnEos,
}

impl Default for LossOptions {
    fn default() -> LossOptions {
        LossOptions {
            roles_to_train: vec![Role::Assistant],
            train_on_eos: TrainOnEos::default(),
        }
    }
}

impl LossOptions {
    /// Whether anything of a message is trained, were it only its end: as its weight says, else if
    /// it has details, else by its role.
    pub fn trains(&self, message: &Message) -> bool {
        match (message.weight, &message.train_detail) {
            (Some(weight), _) => weight != 0.0,
            (None, Some(details)) => !details.is_empty(),
            (None, None) => self.roles_to_train.contains(&message.role),
        }
    }

    /// Whether those parts of a message are trained that do not say it themselves.
    pub(super) fn trains_otherwise(&self, message: &Message) -> bool {
        match message.weight {
            Some(weight) => weight != 0.0,
            None => self.roles_to_train.contains(&message.role),
        }
    }
}

/// Which ends of turns the loss counts: what teaches a model to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOnEos {
    /// The end of every trained turn.
    #[default]
    Turn,
    /// The end of the last trained turn.
    Last,
    /// The end of every turn, whoever speaks.
    All,
}

/// A trained message in a rendered conversation.
#[derive(Debug)]
pub(super) struct Turn {
    /// What of its text is trained, ascending.
    pub(super) said: Vec<Range<usize>>,
    /// What closes the turn, unless the template leaves it open.
    pub(super) end: Option<Range<usize>>,
}

/// The bytes to train: what the turns say, with the ends that are asked for.
pub(super) fn spans(
    turns: Vec<Turn>,
    train_on_eos: TrainOnEos,
    every_end: impl FnOnce() -> Vec<Range<usize>>,
) -> Vec<Range<usize>> {
    let ends: Vec<Range<usize>> = match train_on_eos {
        TrainOnEos::Turn => turns.iter().filter_map(|turn| turn.end.clone()).collect(),
        TrainOnEos::Last => turns
            .iter()
            .rev()
            .find_map(|turn| turn.end.clone())
            .into_iter()
            .collect(),
        TrainOnEos::All => every_end(),
    };
    let said = turns.into_iter().flat_map(|turn| turn.said);
    joined(said.chain(ends).collect())
}

/// The ranges in order, those that touch as one.
pub(super) fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let touches = next.start <= range.end;
        if touches {
            range.end = range.end.max(next.end);
        }
        touches
    });
    ranges
}
