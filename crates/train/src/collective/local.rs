//! Workers that are threads of one process.

use std::io;
use std::sync::mpsc::{Sender, channel};

use super::Collective;
use super::inbox::{Inbox, gone};
use super::mesh::{Link, Mesh};
use crate::Result;

/// A worker among threads; see [`local_group`].
#[derive(Debug)]
pub struct LocalCollective(Mesh<Pipe>);

/// Workers that talk within this process, one for each thread that trains.
///
/// # Panics
/// For no workers.
pub fn local_group(num_workers: usize) -> Vec<LocalCollective> {
    assert!(num_workers > 0, "a group has workers");
    let mut links: Vec<Vec<Option<Pipe>>> = (0..num_workers)
        .map(|_| (0..num_workers).map(|_| None).collect())
        .collect();
    let pairs = (0..num_workers).flat_map(|a| (a + 1..num_workers).map(move |b| (a, b)));
    for (a, b) in pairs {
        let (to_b, from_a) = channel();
        let (to_a, from_b) = channel();
        let pipe = |to, from| {
            let inbox = Inbox::new(from);
            Some(Pipe { to, inbox })
        };
        links[a][b] = pipe(to_b, from_b);
        links[b][a] = pipe(to_a, from_a);
    }
    let workers = links.into_iter().enumerate();
    workers
        .map(|(rank, links)| LocalCollective(Mesh::new(rank, links)))
        .collect()
}

impl Collective for LocalCollective {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn num_workers(&self) -> usize {
        self.0.num_workers()
    }
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.exchange(mine)
    }
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.0.sum(values)
    }
}

/// One end of two channels.
#[derive(Debug)]
struct Pipe {
    to: Sender<io::Result<Vec<u8>>>,
    inbox: Inbox,
}

impl Link for Pipe {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.to.send(Ok(bytes.to_vec())).map_err(|_| gone())
    }

    fn receive(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.inbox.take(bytes)
    }

    fn close(&self) {} // Sending never waits, and dropping one end tells the other.
}

#[cfg(test)]
mod tests {
    crate::collective_tests!(|num_workers: usize| { crate::collective::local_group(num_workers) });
}
