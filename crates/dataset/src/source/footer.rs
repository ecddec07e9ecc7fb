//! A Parquet footer's schema, looked at before the decoder believes it: that takes memory for as
//! many children as a node claims to have, and goes down as deep as they are nested.
//!
//! Only as much of Thrift's compact protocol is read as finds the schema and passes over the rest.

use std::io::{Read, Seek, SeekFrom};

/// How deep a schema may be nested.
const MAX_DEPTH: usize = 100;
/// How deep the footer's own structures may be.
const MAX_STRUCTURES: u8 = 32;
/// The footer's length and the file's mark.
pub(crate) const TAIL_BYTES: u64 = 8;
/// The longest footer.
const MAX_FOOTER: u64 = 256 << 20;

const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
const I32: u8 = 5;

/// Where in a file of `size` bytes the footer with this tail begins; `None` if it is no footer, as
/// the decoder will say.
pub(crate) fn start(tail: &[u8], size: u64) -> Result<Option<u64>, String> {
    let length = tail.strip_suffix(b"PAR1").and_then(<[u8]>::last_chunk);
    let Some(length) = length.copied().map(u32::from_le_bytes).map(u64::from) else {
        return Ok(None);
    };
    if length > MAX_FOOTER {
        return Err(format!("its footer of {length} bytes is over the limit"));
    }
    Ok(size.checked_sub(TAIL_BYTES + length))
}

/// Checks the footer of a file.
pub(super) fn check_file(file: &mut (impl Read + Seek)) -> std::io::Result<Result<(), String>> {
    let size = file.seek(SeekFrom::End(0))?;
    let mut tail = [0; TAIL_BYTES as usize];
    if size < TAIL_BYTES {
        return Ok(Ok(()));
    }
    file.seek(SeekFrom::Start(size - TAIL_BYTES))?;
    file.read_exact(&mut tail)?;
    let footer = match start(&tail, size) {
        Ok(Some(start)) => {
            file.seek(SeekFrom::Start(start))?;
            let mut footer = Vec::new();
            file.take(size - TAIL_BYTES - start)
                .read_to_end(&mut footer)?;
            check(&footer)
        }
        Ok(None) => Ok(()),
        Err(problem) => Err(problem),
    };
    Ok(footer)
}

/// Checks that the schema in a footer is a tree of the nodes that are there, and none too deep.
pub(crate) fn check(footer: &[u8]) -> Result<(), String> {
    let mut scan = Scan(footer);
    scan.fields(|scan, id, kind| {
        if (id, kind) != (2, LIST) {
            return scan.pass(kind, MAX_STRUCTURES);
        }
        let (nodes, kind) = scan.list()?;
        let mut open: Vec<u64> = Vec::new();
        for left in (0..nodes).rev() {
            let children = if kind == STRUCT {
                scan.children()?
            } else {
                scan.pass(kind, MAX_STRUCTURES)?;
                0
            };
            if children > left {
                return Err(format!("a node of its schema claims {children} children"));
            }
            if let Some(siblings) = open.last_mut() {
                *siblings -= 1;
            }
            if children > 0 {
                open.push(children);
            }
            if open.len() > MAX_DEPTH {
                return Err(format!("its schema is more than {MAX_DEPTH} deep"));
            }
            open.truncate(
                open.iter()
                    .rposition(|left| *left > 0)
                    .map_or(0, |at| at + 1),
            );
        }
        Ok(())
    })
}

/// The bytes that are still to be read.
struct Scan<'a>(&'a [u8]);

impl Scan<'_> {
    fn some(&mut self, bytes: u64) -> Result<&[u8], String> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let (some, rest) = self
            .0
            .split_at_checked(bytes)
            .ok_or("its footer ends early")?;
        self.0 = rest;
        Ok(some)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.some(1)?[0])
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err("its footer has a number without end".to_owned())
    }

    /// The length of a list and the kind of its elements, each of them at least one byte.
    fn list(&mut self) -> Result<(u64, u8), String> {
        let head = self.byte()?;
        let length = match head >> 4 {
            15 => self.number()?,
            short => u64::from(short),
        };
        if length > self.0.len() as u64 {
            return Err("a list in its footer is longer than the footer".to_owned());
        }
        Ok((length, head & 0x0f))
    }

    /// Calls `read` with the number and kind of every field of a structure.
    fn fields(
        &mut self,
        mut read: impl FnMut(&mut Self, i64, u8) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            let kind = head & 0x0f;
            if kind == 0 {
                return Ok(());
            }
            id = match head >> 4 {
                0 => zigzag(self.number()?),
                more => id + i64::from(more),
            };
            read(self, id, kind)?;
        }
    }

    /// How many children a node of the schema claims.
    fn children(&mut self) -> Result<u64, String> {
        let mut children = 0;
        self.fields(|scan, id, kind| {
            if (id, kind) != (5, I32) {
                return scan.pass(kind, MAX_STRUCTURES);
            }
            let claimed = zigzag(scan.number()?);
            children = u64::try_from(claimed)
                .map_err(|_| format!("a node of its schema claims {claimed} children"))?;
            Ok(())
        })?;
        Ok(children)
    }

    /// Passes over a value.
    fn pass(&mut self, kind: u8, deeper: u8) -> Result<(), String> {
        let deeper = deeper.checked_sub(1).ok_or("its footer is too deep")?;
        match kind {
            1 | 2 => Ok(()), // true and false have no bytes of their own
            3 => self.some(1).map(drop),
            4..=6 => self.number().map(drop),
            7 => self.some(8).map(drop),
            BINARY => {
                let length = self.number()?;
                self.some(length).map(drop)
            }
            LIST | SET => {
                let (length, kind) = self.list()?;
                (0..length).try_for_each(|_| self.element(kind, deeper))
            }
            MAP => {
                let length = self.number()?;
                if length == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                (0..length).try_for_each(|_| {
                    self.element(kinds >> 4, deeper)?;
                    self.element(kinds & 0x0f, deeper)
                })
            }
            STRUCT => self.fields(|scan, _, kind| scan.pass(kind, deeper)),
            _ => Err("its footer has a value of no known kind".to_owned()),
        }
    }

    /// Passes over an element of a list, where true and false do have a byte.
    fn element(&mut self, kind: u8, deeper: u8) -> Result<(), String> {
        match kind {
            1 | 2 => self.some(1).map(drop),
            kind => self.pass(kind, deeper),
        }
    }
}

fn zigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer of nodes with these many children each.
    fn footer(children: &[i64]) -> Vec<u8> {
        let number = |mut number: u64| {
            let mut bytes = Vec::new();
            while number >= 0x80 {
                bytes.push(number as u8 | 0x80);
                number >>= 7;
            }
            bytes.push(number as u8);
            bytes
        };
        let mut footer = vec![0x15, 2, 0x19, 0xfc];
        footer.extend(number(children.len() as u64));
        for children in children {
            footer.extend([0x48, 1, b'a', 0x15]);
            footer.extend(number(((children << 1) ^ (children >> 63)) as u64));
            footer.push(0);
        }
        footer.extend([0x16, 0, 0x19, 0x0c, 0]);
        footer
    }

    #[test]
    fn only_trees_of_the_nodes_that_are_there_pass() {
        let deep = |depth: usize| [vec![1; depth], vec![0]].concat();
        for sound in [vec![0], vec![2, 0, 1, 0], deep(MAX_DEPTH)] {
            assert_eq!(check(&footer(&sound)), Ok(()), "{sound:?}");
        }
        for (hostile, words) in [
            (vec![i64::from(i32::MAX), 0], "claims 2147483647 children"),
            (vec![2, 0], "claims 2 children"),
            (vec![-1], "claims -1 children"),
            (deep(MAX_DEPTH + 1), "more than 100 deep"),
            (deep(1_000_000), "more than 100 deep"),
        ] {
            let problem = check(&footer(&hostile)).expect_err(words);
            assert!(problem.contains(words), "{problem}");
        }
        let whole = footer(&[2, 0, 1, 0]);
        for length in 0..whole.len() {
            check(&whole[..length]).expect_err("cut off");
        }
    }
}
