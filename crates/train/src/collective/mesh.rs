//! Sums and messages over a link between each two workers.
//!
//! A sum is cut into one slice for each worker: everybody sends slice `r` to worker `r`, who adds them up in the order
//! of ranks and sends the result back. Each worker sends and receives twice the values, whatever their number.

use std::fmt;
use std::io;
use std::ops::Range;
use std::thread;

use super::{Collective, MAX_MESSAGE};
use crate::{Error, Result};

/// One end of a connection between two workers.
pub(super) trait Link: fmt::Debug + Send + Sync {
    /// Sends bytes; may wait for the other side to receive.
    fn send(&self, bytes: &[u8]) -> io::Result<()>;
    /// The next `bytes.len()` bytes of the other side.
    fn receive(&self, bytes: &mut [u8]) -> io::Result<()>;
    /// Ends it: whoever waits at either end hears of it.
    fn close(&self);
}

/// What a frame holds, its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Message = 1,
    Part = 2,
    Sum = 3,
}

const HEADER: usize = 9;

/// All of a worker's links.
#[derive(Debug)]
pub(super) struct Mesh<L> {
    rank: usize,
    /// One for each worker but oneself.
    links: Vec<Option<L>>,
    /// After an error the workers are out of step for good.
    broken: bool,
}

impl<L: Link> Mesh<L> {
    pub(super) fn new(rank: usize, links: Vec<Option<L>>) -> Self {
        Self {
            rank,
            links,
            broken: false,
        }
    }

    #[cfg(test)]
    pub(super) fn link(&self, rank: usize) -> &L {
        self.links[rank].as_ref().expect("another worker's")
    }

    fn slice(&self, of: usize, len: usize) -> Range<usize> {
        let workers = self.links.len();
        len * of / workers..len * (of + 1) / workers
    }

    /// Sends to every other worker what `outgoing` has for it, and takes what comes from each in the order of ranks.
    fn trade<'a>(
        &self,
        kind: Kind,
        outgoing: impl Fn(usize) -> &'a [u8] + Sync,
        mut incoming: impl FnMut(usize, &L) -> io::Result<()>,
    ) -> Result<()> {
        let others = || {
            let links = self.links.iter().enumerate();
            links.filter_map(|(rank, link)| Some((rank, link.as_ref()?)))
        };
        // Each send waits for its receiver, so they run beside each other and beside the receiving.
        thread::scope(|scope| {
            let sends: Vec<_> = others()
                .map(|(rank, link)| {
                    let bytes = outgoing(rank);
                    let send = move || {
                        let mut header = [0; HEADER];
                        header[0] = kind as u8;
                        header[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
                        link.send(&header)?;
                        // Nobody waits for an empty rest, and so may be gone already.
                        match bytes {
                            [] => Ok(()),
                            rest => link.send(rest),
                        }
                    };
                    (rank, scope.spawn(send))
                })
                .collect();
            for (rank, link) in others() {
                if let Err(source) = incoming(rank, link) {
                    // The sends of the others may wait for us, and ours for them.
                    others().for_each(|(_, link)| link.close());
                    return Err(Error::Worker { rank, source });
                }
            }
            for (rank, send) in sends {
                let sent = send
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                sent.map_err(|source| Error::Worker { rank, source })?;
            }
            Ok(())
        })
    }

    fn exchange_once(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut all = vec![Vec::new(); self.links.len()];
        all[self.rank] = mine.to_vec();
        self.trade(
            Kind::Message,
            |_| mine,
            |rank, link| {
                let len = receive_header(link, Kind::Message)?;
                if len > MAX_MESSAGE {
                    return Err(out_of_step(&format!("a message of {len} bytes")));
                }
                all[rank].resize(len, 0);
                link.receive(&mut all[rank])
            },
        )?;
        Ok(all)
    }

    fn sum_once(&self, values: &mut [f32]) -> Result<()> {
        let own = self.slice(self.rank, values.len());
        let parts: Vec<Vec<u8>> = (0..self.links.len())
            .map(|rank| match rank == self.rank {
                true => Vec::new(),
                false => to_bytes(&values[self.slice(rank, values.len())]),
            })
            .collect();
        let mut received: Vec<Option<Vec<u8>>> = vec![None; self.links.len()];
        self.trade(
            Kind::Part,
            |rank| &parts[rank],
            |rank, link| {
                received[rank] = Some(receive_floats(link, Kind::Part, own.len())?);
                Ok(())
            },
        )?;
        // The sum starts from the first worker's values, on whichever worker it is made.
        let mut sum = match &received[0] {
            Some(first) => from_bytes(first),
            None => values[own.clone()].to_vec(),
        };
        for part in &received[1..] {
            match part {
                Some(bytes) => add(&mut sum, floats(bytes)),
                None => add(&mut sum, values[own.clone()].iter().copied()),
            }
        }
        let summed = to_bytes(&sum);
        values[own].copy_from_slice(&sum);
        self.trade(
            Kind::Sum,
            |_| &summed,
            |rank, link| {
                let slice = self.slice(rank, values.len());
                let bytes = receive_floats(link, Kind::Sum, slice.len())?;
                for (value, sum) in values[slice].iter_mut().zip(floats(&bytes)) {
                    *value = sum;
                }
                Ok(())
            },
        )
    }

    /// Runs what all workers do together; once it fails, nothing more is tried.
    fn together<R>(&mut self, work: impl FnOnce(&Self) -> Result<R>) -> Result<R> {
        if self.broken {
            let source = io::Error::other("an earlier exchange failed");
            let rank = self.rank;
            return Err(Error::Worker { rank, source });
        }
        let done = work(self);
        self.broken = done.is_err();
        if self.broken {
            self.links.iter_mut().for_each(|link| *link = None); // so that the others learn of it
        }
        done
    }
}

impl<L: Link> Collective for Mesh<L> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn num_workers(&self) -> usize {
        self.links.len()
    }

    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        assert!(mine.len() <= MAX_MESSAGE, "a message is short");
        self.together(|mesh| mesh.exchange_once(mine))
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.together(|mesh| mesh.sum_once(values))
    }
}

fn receive_header(link: &impl Link, expected: Kind) -> io::Result<usize> {
    let mut header = [0; HEADER];
    link.receive(&mut header)?;
    let (kind, len) = header.split_first().expect("nine bytes");
    if *kind != expected as u8 {
        return Err(out_of_step(&format!("{expected:?} expected, {kind} came")));
    }
    let len = u64::from_le_bytes(len.try_into().expect("eight bytes"));
    usize::try_from(len).map_err(|_| out_of_step(&format!("{len} bytes")))
}

fn receive_floats(link: &impl Link, kind: Kind, count: usize) -> io::Result<Vec<u8>> {
    let len = receive_header(link, kind)?;
    if len != 4 * count {
        return Err(out_of_step(&format!("{len} bytes for {count} values")));
    }
    let mut bytes = vec![0; len];
    link.receive(&mut bytes)?;
    Ok(bytes)
}

fn out_of_step(what: &str) -> io::Error {
    let what = format!("{what}: the workers run different programs or settings");
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
}

fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    floats(bytes).collect()
}

fn add(sums: &mut [f32], values: impl Iterator<Item = f32>) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}
