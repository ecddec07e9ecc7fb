//! Who runs the loops: the calling thread, or a pool that is passed in and never global.

use std::ops::Range;
use std::sync::Arc;
use std::{fmt, io};

use crate::{Mat, MatMut};

/// A handle on the threads that operations may use. Cloning shares the pool.
///
/// One thread means the calling one: nothing is spawned and no pool is touched.
#[derive(Clone)]
pub struct Threads {
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Threads {
    /// The calling thread alone.
    #[must_use]
    pub fn single() -> Self {
        Self { pool: None }
    }

    /// A pool of `num_threads`; 0 and 1 are [`Threads::single`].
    ///
    /// # Errors
    /// If the operating system refuses to start a thread.
    pub fn new(num_threads: usize) -> io::Result<Self> {
        if num_threads <= 1 {
            return Ok(Self::single());
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(num_threads)
            .thread_name(|index| format!("updraft-kernels-{index}"))
            .build()
            .map_err(io::Error::other)?;
        Ok(Self {
            pool: Some(Arc::new(pool)),
        })
    }

    /// How many threads work at once.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.pool
            .as_ref()
            .map_or(1, |pool| pool.current_num_threads())
    }

    /// Runs `work` on a thread of the pool, so that the operations inside hand each other work without waking the pool
    /// anew each time. Worth wrapping around a whole training step or decoding step.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// Cuts `parts` into at most one contiguous piece for each thread, none shorter than `min_len`, and runs them at
    /// once. Where it cuts depends on the lengths and the number of threads only.
    pub fn split<P: Parts>(&self, parts: P, min_len: usize, run: impl Fn(P) + Sync) {
        let pieces = (parts.num_rows() / min_len.max(1)).clamp(1, self.num_threads());
        match &self.pool {
            Some(pool) if pieces > 1 => pool.install(|| split_in(parts, pieces, &run)),
            _ => run(parts),
        }
    }

    /// Runs every unit once, on whichever thread is free; each thread brings its own scratch. For units that differ in
    /// size and write apart from each other, so that the order cannot show.
    pub(crate) fn for_each<U: Send, S: Default>(
        &self,
        units: &mut [U],
        run: impl Fn(&mut S, &mut U) + Sync,
    ) {
        match &self.pool {
            Some(pool) if units.len() > 1 => pool.install(|| {
                use rayon::prelude::*;
                units
                    .par_iter_mut()
                    .with_max_len(1)
                    .for_each_init(S::default, |scratch, unit| run(scratch, unit));
            }),
            _ => {
                let mut scratch = S::default();
                for unit in units {
                    run(&mut scratch, unit);
                }
            }
        }
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("num_threads", &self.num_threads())
            .finish()
    }
}

fn split_in<P: Parts>(parts: P, pieces: usize, run: &(impl Fn(P) + Sync)) {
    if pieces == 1 {
        return run(parts);
    }
    let left = pieces / 2;
    let at = parts.num_rows() * left / pieces;
    let (first, second) = parts.split_at_row(at);
    rayon::join(
        || split_in(first, left, run),
        || split_in(second, pieces - left, run),
    );
}

/// Something that can be cut in two at a row: slices by element, matrices by row, a tuple at the same row of each.
pub trait Parts: Send + Sized {
    /// Number of rows.
    fn num_rows(&self) -> usize;
    /// The rows before `row`, and the others.
    fn split_at_row(self, row: usize) -> (Self, Self);
}

impl Parts for Range<usize> {
    fn num_rows(&self) -> usize {
        ExactSizeIterator::len(self)
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        let middle = self.start + row;
        (self.start..middle, middle..self.end)
    }
}

impl<F: Sync> Parts for &[F] {
    fn num_rows(&self) -> usize {
        <[F]>::len(self)
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        <[F]>::split_at(self, row)
    }
}

impl<F: Send> Parts for &mut [F] {
    fn num_rows(&self) -> usize {
        <[F]>::len(self)
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        <[F]>::split_at_mut(self, row)
    }
}

impl<F: Sync> Parts for Mat<'_, F> {
    fn num_rows(&self) -> usize {
        Self::num_rows(self)
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        (self.rows(0..row), self.rows(row..self.num_rows()))
    }
}

impl<F: Send> Parts for MatMut<'_, F> {
    fn num_rows(&self) -> usize {
        Self::num_rows(self)
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        self.split_rows(row)
    }
}

macro_rules! tuple_parts {
    ($first:ident $(, $rest:ident)+) => {
        impl<$first: Parts $(, $rest: Parts)+> Parts for ($first, $($rest),+) {
            fn num_rows(&self) -> usize {
                self.0.num_rows()
            }
            #[expect(non_snake_case, reason = "a type and its value share a name")]
            fn split_at_row(self, row: usize) -> (Self, Self) {
                let ($first, $($rest),+) = self;
                let $first = $first.split_at_row(row);
                $(let $rest = $rest.split_at_row(row);)+
                (($first.0, $($rest.0),+), ($first.1, $($rest.1),+))
            }
        }
    };
}

tuple_parts!(A, B);
tuple_parts!(A, B, C);
tuple_parts!(A, B, C, D);
tuple_parts!(A, B, C, D, E);
tuple_parts!(A, B, C, D, E, G);

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn cuts(num_threads: usize, len: usize, min_len: usize) -> Vec<(usize, usize)> {
        let seen = Mutex::new(Vec::new());
        Threads::new(num_threads)
            .expect("threads")
            .split(0..len, min_len, |part| {
                seen.lock().expect("lock").push((part.start, part.end));
            });
        let mut seen = seen.into_inner().expect("lock");
        seen.sort_unstable();
        seen
    }

    #[test]
    fn cuts_depend_on_lengths_alone() {
        assert_eq!(cuts(1, 10, 1), [(0, 10)]);
        assert_eq!(cuts(3, 10, 1), [(0, 3), (3, 6), (6, 10)]);
        assert_eq!(cuts(3, 10, 5), [(0, 5), (5, 10)]);
        assert_eq!(cuts(3, 10, 6), [(0, 10)]);
        assert_eq!(cuts(3, 0, 1), [(0, 0)]);
    }

    #[test]
    fn one_thread_is_the_calling_one() {
        let caller = std::thread::current().id();
        let single = Threads::new(1).expect("nothing to start");
        single.split(0..100, 1, |_| {
            assert_eq!(std::thread::current().id(), caller);
        });
        single.for_each(&mut [(), ()], |(), ()| {
            assert_eq!(std::thread::current().id(), caller);
        });
        single.install(|| assert_eq!(std::thread::current().id(), caller));
        assert_eq!(single.num_threads(), 1);
    }

    #[test]
    fn every_unit_runs_once() {
        for num_threads in [1, 4] {
            let mut units = [0; 33];
            Threads::new(num_threads)
                .expect("threads")
                .for_each(&mut units, |(), unit| *unit += 1);
            assert_eq!(units, [1; 33]);
        }
    }

    #[test]
    fn tuples_are_cut_at_the_same_row() {
        let (source, mut target) = ((0..40).collect::<Vec<u32>>(), vec![0; 20]);
        let parts = (Mat::new(&source, 20, 2), &mut target[..]);
        Threads::new(4)
            .expect("threads")
            .split(parts, 1, |(source, target)| {
                for (row, target) in target.iter_mut().enumerate() {
                    *target = source.row(row)[1];
                }
            });
        assert_eq!(target, (0..20).map(|i| 2 * i + 1).collect::<Vec<u32>>());
    }
}
