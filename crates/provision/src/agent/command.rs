//! The agent's command line, which [`AgentClient`](super::AgentClient) speaks over a transport.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use super::queue::{JobSpec, Queue};
use super::runner::{Agent, now};
use crate::error::{Error, Result};

/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(50);

/// Runs one command of the agent; answers go to `out`, and what is said about a job beside its output
/// to `about`.
///
/// `run DIR`, `set DIR NAME VALUE`, `submit DIR` (the job as JSON in `UPDRAFT_JOB`), `queue DIR`,
/// `cancel DIR ID|all`, `logs DIR ID|last [follow]`, `lease DIR JSON`, `hold DIR SECONDS`,
/// `lead DIR ADDRESS`, `follow DIR` (its place as JSON in `UPDRAFT_PLACE`).
///
/// # Errors
/// [`Error::InvalidTask`] for a command that is none; else the queue's.
pub fn command(args: &[String], out: &mut dyn Write, about: &mut dyn Write) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["run", dir] => match Agent::take(dir)? {
            Some(agent) => agent.run(about),
            None => Ok(()),
        },
        ["set", dir, name, value] => Queue::open(dir)?.set(name, value),
        ["submit", dir] => {
            let text = std::env::var("UPDRAFT_JOB").unwrap_or_default();
            let spec: JobSpec = serde_json::from_str(&text).map_err(|_| Error::InvalidTask {
                what: "UPDRAFT_JOB must hold a job as JSON".to_owned(),
            })?;
            let id = Queue::open(dir)?.submit(&spec, now())?;
            say(out, &id.to_string())
        }
        ["queue", dir] => {
            for job in Queue::open(dir)?.jobs()? {
                say(out, &serde_json::to_string(&job).unwrap_or_default())?;
            }
            Ok(())
        }
        ["cancel", dir, which] => {
            let id = match *which {
                "all" => None,
                id => Some(number(id)?),
            };
            let cancelled = Queue::open(dir)?.cancel(id, now())?;
            say(out, &cancelled.to_string())
        }
        ["logs", dir, id, rest @ ..] => {
            let queue = Queue::open(dir)?;
            let jobs = queue.jobs()?;
            let wanted = match *id {
                "last" => jobs.last(),
                id => {
                    let id = number(id)?;
                    jobs.iter().find(|job| job.head == id)
                }
            };
            let id = wanted.map(|job| job.id).ok_or_else(no_such_job)?;
            logs(&queue, id, rest.contains(&"follow"), out, about)
        }
        ["lease", dir, text] => {
            let lease = serde_json::from_str(text).map_err(|_| Error::InvalidTask {
                what: "a lease must be JSON".to_owned(),
            })?;
            Queue::open(dir)?.set_lease(&lease, now())
        }
        ["hold", dir, seconds] => Queue::open(dir)?.hold(now() + number(seconds)?),
        ["lead", dir, address] => {
            let address = address.parse().map_err(|_| Error::InvalidTask {
                what: format!("`{address}` is not an address to listen at"),
            })?;
            let head = Queue::open(dir)?.lead(address)?;
            say(out, &serde_json::to_string(&head).unwrap_or_default())
        }
        ["follow", dir] => {
            let text = std::env::var("UPDRAFT_PLACE").unwrap_or_default();
            let place = serde_json::from_str(&text).map_err(|_| Error::InvalidTask {
                what: "UPDRAFT_PLACE must hold a place as JSON".to_owned(),
            })?;
            Queue::open(dir)?.follow(&place)
        }
        _ => Err(Error::InvalidTask {
            what: "unknown command of the agent; client and node may be of different versions"
                .to_owned(),
        }),
    }
}

/// Copies a job's log; following it ends with the job, and tells `about` what has become of it: the
/// node may be gone when it is asked.
fn logs(
    queue: &Queue,
    id: i64,
    follow: bool,
    out: &mut dyn Write,
    about: &mut dyn Write,
) -> Result<()> {
    let path = queue.log(id);
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let mut at = 0;
    loop {
        // Asked before reading: what is written until the end is read after it.
        let over = queue.job(id)?.filter(|job| job.status.is_final());
        file.seek(SeekFrom::Start(at)).map_err(Error::io(&path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io(&path))?;
        at += bytes.len() as u64;
        out.write_all(&bytes)
            .and_then(|()| out.flush())
            .map_err(Error::io(PathBuf::from("output")))?;
        if over.is_some() || !follow {
            return match over {
                Some(job) if follow => say(about, &serde_json::to_string(&job).unwrap_or_default()),
                _ => Ok(()),
            };
        }
        // A node that was taken down leaves nobody to write the job's end.
        if let Err(gone) = path.metadata() {
            return Err(Error::io(&path)(gone));
        }
        std::thread::sleep(FOLLOW);
    }
}

fn say(out: &mut dyn Write, line: &str) -> Result<()> {
    writeln!(out, "{line}").map_err(Error::io("output"))
}

fn number(text: &str) -> Result<i64> {
    text.parse().map_err(|_| Error::InvalidTask {
        what: format!("`{text}` is not the number of a job"),
    })
}

fn no_such_job() -> Error {
    Error::InvalidTask {
        what: "there is no such job; `queue` lists those there are".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells where the log has come to.
    struct Told(std::sync::mpsc::Sender<usize>);

    impl Write for Told {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.send(bytes.len()); // nobody listens at the end
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn following_a_log_ends_when_its_node_is_gone() {
        let node = tempfile::tempdir().expect("a temporary folder");
        let dir = node.path().join(".updraft");
        let queue = Queue::open(&dir).expect("a queue");
        let id = queue.submit(&JobSpec::default(), 1).expect("a job");
        let log = queue.log(id);
        std::fs::create_dir_all(log.parent().expect("a folder")).expect("made");
        std::fs::write(&log, "begun").expect("written");
        let (told, lines) = std::sync::mpsc::channel();
        let follower = std::thread::spawn(move || {
            let mut about = Vec::new();
            logs(&queue, id, true, &mut Told(told), &mut about)
        });
        assert_eq!(lines.recv(), Ok("begun".len()));
        drop(node);
        let ended = follower.join().expect("no panic").expect_err("gone");
        assert!(matches!(ended, Error::Io { .. }), "{ended}");
    }
}
