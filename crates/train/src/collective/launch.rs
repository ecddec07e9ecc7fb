//! What launchers tell a process about the others.

use crate::{Error, Result};

/// Where torch listens if nobody says otherwise.
const DEFAULT_PORT: &str = "29500";

/// One of several processes that train one run, and where they meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// This process's number, from zero.
    pub rank: usize,
    /// How many there are.
    pub num_workers: usize,
    /// Where the first one listens, `host:port`.
    pub master: String,
}

/// A launcher's variables: its number, of how many, and whether it names the meeting point itself.
const LAUNCHERS: [(&str, &str, Option<&str>); 3] = [
    ("RANK", "WORLD_SIZE", None),
    (
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_NODES",
        Some("SKYPILOT_NODE_IPS"),
    ),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
];

impl Launch {
    /// What the environment of torchrun, SkyPilot or an indexed job of Kubernetes says, in this order; `None` where
    /// none does, or where there is one process only. `variable` looks up one variable.
    ///
    /// The meeting point is `MASTER_ADDR` and `MASTER_PORT` as torch reads them, or the port beside it where torchrun itself
    /// listens at that one (`TORCHELASTIC_USE_AGENT_STORE`, its default: `torchrun --no-python`). SkyPilot names its nodes in
    /// `SKYPILOT_NODE_IPS`, the first of which is it, and the port is 29500 unless `MASTER_PORT` is set.
    ///
    /// # Errors
    /// [`Error::Launch`] says which variable is missing or makes no sense.
    ///
    /// ```
    /// # use updraft_train::Launch;
    /// let variables = [("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "10.0.0.7"), ("MASTER_PORT", "29501")];
    /// let find = |name: &str| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned());
    /// let launch = Launch::from_env(find)?.expect("one of four");
    /// assert_eq!((launch.rank, launch.master.as_str()), (1, "10.0.0.7:29501"));
    /// # Ok::<(), updraft_train::Error>(())
    /// ```
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let Some((rank_name, count_name, nodes)) = LAUNCHERS
            .into_iter()
            .find(|(rank, _, _)| variable(rank).is_some())
        else {
            return Ok(None);
        };
        let number = |name: &'static str| -> Result<usize> {
            let text = variable(name).ok_or_else(|| missing(name))?;
            text.parse().map_err(|_| Error::Launch {
                variable: name,
                problem: format!("is {text:?}, not a number"),
            })
        };
        let (rank, num_workers) = (number(rank_name)?, number(count_name)?);
        if rank >= num_workers {
            return Err(Error::Launch {
                variable: rank_name,
                problem: format!("is {rank}, but there are {num_workers} ({count_name})"),
            });
        }
        if num_workers == 1 {
            return Ok(None);
        }
        let first_node = || {
            let nodes = variable(nodes?)?;
            nodes.lines().next().map(|ip| ip.trim().to_owned())
        };
        let host = variable("MASTER_ADDR").or_else(first_node);
        let host = host.ok_or_else(|| missing("MASTER_ADDR"))?;
        let port = variable("MASTER_PORT").unwrap_or(DEFAULT_PORT.to_owned());
        let port: u16 = port.parse().map_err(|_| Error::Launch {
            variable: "MASTER_PORT",
            problem: format!("is {port:?}, not a port"),
        })?;
        let port = match variable("TORCHELASTIC_USE_AGENT_STORE").as_deref() {
            Some("True") => port.checked_add(1).unwrap_or(port - 1),
            _ => port,
        };
        let master = match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        Ok(Some(Self {
            rank,
            num_workers,
            master,
        }))
    }
}

fn missing(variable: &'static str) -> Error {
    Error::Launch {
        variable,
        problem: "is not set".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::from_env(|name| {
            let found = variables.iter().find(|(own, _)| *own == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_launcher_is_understood() {
        let of = |rank, num_workers, master: &str| {
            Some(Launch {
                rank,
                num_workers,
                master: master.to_owned(),
            })
        };
        let torch = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("MASTER_ADDR", "fd00::1"),
            ("MASTER_PORT", "1234"),
        ];
        let sky = [
            ("SKYPILOT_NODE_RANK", "1"),
            ("SKYPILOT_NUM_NODES", "2"),
            ("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2"),
        ];
        let agent = [
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "65535"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ];
        let kubernetes = [
            ("JOB_COMPLETION_INDEX", "0"),
            ("JOB_COMPLETIONS", "2"),
            ("MASTER_ADDR", "job-0.job"),
        ];
        for (variables, expected) in [
            (&torch[..], of(3, 8, "[fd00::1]:1234")),
            (&agent, of(1, 2, "localhost:65534")),
            (&sky, of(1, 2, "10.0.0.1:29500")),
            (&kubernetes, of(0, 2, "job-0.job:29500")),
            (&[], None),
            (&[("RANK", "0"), ("WORLD_SIZE", "1")], None),
        ] {
            assert_eq!(launch(variables).expect("understood"), expected);
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (variables, expected) in [
            (&[("RANK", "0")][..], "WORLD_SIZE is not set"),
            (
                &[("RANK", "one"), ("WORLD_SIZE", "2")],
                "RANK is \"one\", not a number",
            ),
            (
                &[("RANK", "2"), ("WORLD_SIZE", "2")],
                "RANK is 2, but there are 2 (WORLD_SIZE)",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2")],
                "MASTER_ADDR is not set",
            ),
            (
                &[
                    ("RANK", "0"),
                    ("WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "here"),
                    ("MASTER_PORT", "tcp://10.0.0.1:80"),
                ],
                "MASTER_PORT is \"tcp://10.0.0.1:80\", not a port",
            ),
        ] {
            let error = launch(variables).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
