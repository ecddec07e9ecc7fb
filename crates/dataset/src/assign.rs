//! Which of the work is whose: worker `index` of `count` takes every `count`-th item.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One of the workers that share a dataset.
///
/// Workers share by the place in the order (`i % count == index`), so another number of workers
/// can take over at any place: together they take each item once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    index: u64,
    count: u64,
}

/// Where launchers say which worker a process is: torchrun, SkyPilot, Kubernetes.
const VARIABLES: [(&str, &str); 3] = [
    ("RANK", "WORLD_SIZE"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
];

impl Default for Worker {
    /// The only one.
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Worker {
    /// Worker `index` of `count`.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] unless `index < count`.
    pub fn new(index: u64, count: u64) -> Result<Self> {
        if index < count {
            return Ok(Self { index, count });
        }
        Err(Error::InvalidOption {
            option: "worker",
            problem: format!(
                "is {index} of {count}: workers count from 0 to one below their number"
            ),
        })
    }

    /// The worker that the environment of torchrun, SkyPilot or Kubernetes describes, in this
    /// order; the only one if none does. `variable` looks up one variable.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if a variable is no number or does not fit the other, or if only
    /// the worker's own number is set, as Kubernetes does: then set `JOB_COMPLETIONS` too.
    ///
    /// ```
    /// # use updraft_dataset::Worker;
    /// let vars = [("RANK", "1"), ("WORLD_SIZE", "4")];
    /// let worker = Worker::from_env(|name| vars.iter().find(|var| var.0 == name).map(|var| var.1.to_owned()))?;
    /// assert_eq!(worker, Worker::new(1, 4)?);
    /// # Ok::<(), updraft_dataset::Error>(())
    /// ```
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &'static str| {
            let parse = |text: String| {
                text.parse().map_err(|_| Error::InvalidOption {
                    option: name,
                    problem: format!("is '{text}': give a number"),
                })
            };
            variable(name).map(parse).transpose()
        };
        for (index, count) in VARIABLES {
            match (number(index)?, number(count)?) {
                (Some(index), Some(count)) => return Self::new(index, count),
                // One of several that does not know of how many would take what is the others'.
                (Some(found), None) => {
                    return Err(Error::InvalidOption {
                        option: index,
                        problem: format!(
                            "is {found}, but {count} is not set: set it to the number of workers"
                        ),
                    });
                }
                (None, _) => {}
            }
        }
        Ok(Self::default())
    }

    /// From 0.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// How many workers there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether the item at this place of the order is this worker's.
    pub fn takes(&self, place: u64) -> bool {
        place % self.count == self.index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_workers_takes_each_place_once() {
        for count in 1..9 {
            for place in 0..100 {
                let takers = (0..count)
                    .filter(|&index| Worker::new(index, count).expect("valid").takes(place))
                    .count();
                assert_eq!(takers, 1, "place {place} of {count} workers");
            }
        }
    }

    #[test]
    fn an_impossible_worker_is_refused() {
        assert!(Worker::new(3, 3).is_err());
        assert!(Worker::new(0, 0).is_err());
        let half = |name: &str| (name == "RANK").then(|| "1".to_owned());
        assert_eq!(
            Worker::from_env(half).expect_err("no world").to_string(),
            "RANK is 1, but WORLD_SIZE is not set: set it to the number of workers"
        );
        let launched = |variables: &[(&str, &str)]| {
            let find = |name: &str| {
                variables
                    .iter()
                    .find(|var| var.0 == name)
                    .map(|var| var.1.to_owned())
            };
            Worker::from_env(find).expect("a launcher's variables")
        };
        assert_eq!(launched(&[]), Worker::default());
        assert_eq!(launched(&[("WORLD_SIZE", "4")]), Worker::default());
        let torchrun = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")];
        let skypilot = [("SKYPILOT_NODE_RANK", "1"), ("SKYPILOT_NUM_NODES", "2")];
        let kubernetes = [("JOB_COMPLETION_INDEX", "2"), ("JOB_COMPLETIONS", "3")];
        assert_eq!(launched(&torchrun), Worker { index: 5, count: 8 });
        assert_eq!(launched(&skypilot), Worker { index: 1, count: 2 });
        assert_eq!(launched(&kubernetes), Worker { index: 2, count: 3 });
        assert_eq!(
            launched(&[skypilot, [torchrun[0], torchrun[1]]].concat()),
            Worker { index: 5, count: 8 }
        );
        let bad = |name: &str| Some(if name == "RANK" { "one" } else { "2" }.to_owned());
        assert_eq!(
            Worker::from_env(bad).expect_err("no number").to_string(),
            "RANK is 'one': give a number"
        );
    }
}
