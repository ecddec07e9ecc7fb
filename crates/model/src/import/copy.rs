//! Copying: a source's files into the stage, in an order in which every part is kept as it comes.
//!
//! A large file from the Hub comes in segments. Each goes on to the file's object, and also into
//! an object of its own with a record in the journal, so that a later try takes it from there: an
//! object that is being written cannot be gone on with. When the file is whole its segments go.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use futures::stream;
use futures::{StreamExt as _, TryStreamExt as _};
use updraft_store::{
    CancelToken, Hashed, JournalEntry, ObjectEntry, Progress, ProgressSink, StageWriter, fetch,
    sha256_hex,
};

use super::source::{Body, Source, SourceFile};
use crate::error::Result;

/// Bytes of a file that a killed import fetches again at most, for each of those on their way.
pub(super) const SEGMENT_BYTES: u64 = 32 << 20;
/// Segments on their way at a time; memory holds so many.
const SEGMENTS_AT_ONCE: usize = 2;

/// Copies files into a stage.
pub(super) struct Copy<'a> {
    pub(super) source: &'a Source,
    pub(super) writer: &'a StageWriter,
    pub(super) segment_bytes: u64,
    pub(super) progress: &'a dyn ProgressSink,
    pub(super) cancel: &'a CancelToken,
}

/// A file and the records it has in the journal.
struct Numbered<'a> {
    file: &'a SourceFile,
    /// The number of its first segment's record; its own comes after its last segment's.
    first: u32,
    segments: Vec<Range<u64>>,
}

impl Numbered<'_> {
    fn whole(&self) -> u32 {
        self.first + self.segments.len() as u32
    }
}

impl Copy<'_> {
    /// Copies what an earlier try has not.
    pub(super) async fn all(&self, files: &[SourceFile]) -> Result<Vec<ObjectEntry>> {
        let journal = self.writer.journal().await?;
        let total = files.iter().map(|file| file.bytes).sum();
        let (mut done, mut objects, mut number) = (0, Vec::new(), 0);
        let report =
            |done| (self.progress).report(&Progress::new("import", done, Some(total), "bytes"));
        for file in files {
            let file = self.numbered(file, number);
            number = file.whole() + 1;
            let entry = match journal.get(&file.whole()) {
                Some(entry) => entry.clone(),
                None => {
                    let mut copied = done;
                    let progress = |bytes| {
                        copied += bytes;
                        report(copied);
                    };
                    self.file(&file, &journal, progress).await?
                }
            };
            self.remove_segments(&file).await?;
            objects.extend(entry.objects);
            done += file.file.bytes;
            report(done);
        }
        Ok(objects)
    }

    fn numbered<'f>(&self, file: &'f SourceFile, first: u32) -> Numbered<'f> {
        let is_far = self.source.is_far() && file.bytes > self.segment_bytes;
        let starts = (0..file.bytes).step_by(self.segment_bytes as usize);
        let segments = starts.map(|start| start..file.bytes.min(start + self.segment_bytes));
        let segments = segments.filter(|_| is_far).collect();
        Numbered {
            file,
            first,
            segments,
        }
    }

    async fn file(
        &self,
        numbered: &Numbered<'_>,
        journal: &BTreeMap<u32, JournalEntry>,
        progress: impl FnMut(u64),
    ) -> Result<JournalEntry> {
        let file = numbered.file;
        let body = if numbered.segments.is_empty() {
            self.source.stream(file)?
        } else {
            self.segments(numbered, journal)?
        };
        let object = self.writer.object_writer(&file.name)?;
        let sha256 = file.sha256.as_deref();
        let copied = fetch::copy(body, object, sha256, self.cancel, progress).await;
        if let Err(updraft_store::Error::Corrupt { .. }) = copied {
            self.forget_segments(numbered).await?;
        }
        let entry = JournalEntry {
            objects: vec![copied?],
            ..JournalEntry::default()
        };
        Ok(self.writer.put_journal(numbered.whole(), &entry).await?)
    }

    /// The bytes of all segments, in order.
    fn segments(
        &self,
        numbered: &Numbered<'_>,
        journal: &BTreeMap<u32, JournalEntry>,
    ) -> Result<Body> {
        let mut segments = Vec::new();
        for (range, number) in numbered.segments.iter().zip(numbered.first..) {
            let bytes = range.end - range.start;
            let kept = (journal.get(&number))
                .and_then(|entry| entry.objects.first())
                .filter(|object| object.bytes == bytes);
            segments.push(Segment {
                writer: self.writer.clone(),
                number,
                kept: kept.cloned(),
                body: self.source.range(numbered.file, range.clone())?,
            });
        }
        let body = stream::iter(segments)
            .map(Segment::obtain)
            .buffered(SEGMENTS_AT_ONCE)
            .boxed();
        match numbered.file.sha256 {
            Some(_) => Ok(body), // compared when the object is whole
            None => self.source.checked(numbered.file, body),
        }
    }

    /// Deletes the segments of a file that is whole.
    async fn remove_segments(&self, numbered: &Numbered<'_>) -> Result<()> {
        if numbered.segments.is_empty() {
            return Ok(());
        }
        let folder = format!("{}/", self.writer.path(SEGMENTS));
        let own = numbered.first..numbered.whole();
        for object in self
            .writer
            .store()
            .list(folder.trim_end_matches('/'))
            .await?
        {
            let name = object.path.strip_prefix(&folder).unwrap_or_default();
            let number = name
                .split('-')
                .next()
                .and_then(|number| number.parse().ok());
            if number.is_some_and(|number| own.contains(&number)) {
                self.writer.store().delete(&object.path).await?;
            }
        }
        Ok(())
    }

    /// Deletes the segments of a file that are not what they should be, and their records: the
    /// next try fetches them again.
    async fn forget_segments(&self, numbered: &Numbered<'_>) -> Result<()> {
        for number in numbered.first..numbered.whole() {
            self.writer.remove_journal(number).await?;
        }
        self.remove_segments(numbered).await
    }
}

/// Where segments lie in the stage's folder while their file is not whole.
const SEGMENTS: &str = "segments";

/// A part of a file, kept from an earlier try or to be fetched.
struct Segment {
    writer: StageWriter,
    number: u32,
    kept: Option<ObjectEntry>,
    body: Body,
}

impl Segment {
    async fn obtain(self) -> updraft_store::Result<Bytes> {
        let Self {
            writer,
            number,
            kept,
            body,
        } = self;
        if let Some(kept) = kept {
            let bytes = writer.store().get(&writer.path(&kept.path)).await?;
            if let Some(bytes) = bytes.filter(|bytes| sha256_hex(bytes) == kept.sha256) {
                return Ok(bytes);
            }
        }
        let parts: Vec<Bytes> = body.try_collect().await?;
        let segment = Hashed::new(parts.concat());
        let name = format!("{SEGMENTS}/{number:05}-{}", &segment.sha256()[..16]);
        let entry = JournalEntry {
            objects: vec![writer.put_hashed(&name, &segment).await?],
            ..JournalEntry::default()
        };
        writer.put_journal(number, &entry).await?;
        Ok(segment.bytes().clone())
    }
}
