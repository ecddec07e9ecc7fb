//! Content-addressed stages, manifests and commits over any object store.
//!
//! A *stage* is a function from inputs to a folder of objects. Its *key* is the hash of
//! everything that decides its output, so a finished stage is found instead of made again;
//! its *manifest*, written last and only once, is what makes it finished. A program killed
//! at any moment and run again ends with the same manifest.
//!
//! ```
//! use bytes::Bytes;
//! use serde_json::json;
//! use updraft_store::{ManifestDraft, Opened, StageId, Store, open_stage};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> updraft_store::Result<()> {
//! let store = Store::open("memory://")?; // or a folder, or s3://bucket/prefix
//! let id = StageId::standardized("letters")?;
//! let inputs = json!({ "source": "letters.jsonl", "sha256": "9f86d0…", "version": 1 });
//!
//! let Opened::Open(stage) = open_stage(&store, &id, "import", &inputs).await? else {
//!     unreachable!("a new store has no finished stage");
//! };
//! let shard = stage.put_object("shard-00000.txt", Bytes::from("s, t, r, a, w")).await?;
//! stage.commit(ManifestDraft { objects: vec![shard], ..ManifestDraft::default() }).await?;
//!
//! // The same inputs again: one GET, no PUT.
//! let again = open_stage(&store, &id, "import", &inputs).await?;
//! assert!(matches!(again, Opened::Finished(_)));
//! # Ok(()) }
//! ```

pub mod cancel;
mod commit;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
#[cfg(feature = "conformance")]
pub mod faults;
pub mod fetch;
#[cfg(feature = "hub")]
pub mod hub;
mod journal;
pub mod layout;
mod manifest;
mod object;
mod object_writer;
pub mod progress;
mod s3;
mod stage_key;
#[cfg(any(feature = "s3", feature = "hub"))]
mod tls;
mod url;

pub use cancel::CancelToken;
pub use commit::{
    FinishedStage, Opened, StageObjectWriter, StageWriter, current, finished, garbage, open_stage,
};
pub use error::{BoxError, Error, Result};
pub use journal::JournalEntry;
pub use layout::{Area, StageId};
pub use manifest::{FORMAT_VERSION, Manifest, ManifestDraft, ObjectEntry, Reject};
pub use object::{Created, ObjectInfo};
pub use object_writer::ObjectWriter;
pub use progress::{NoProgress, Progress, ProgressSink};
pub use stage_key::{StageKey, sha256_hex};
pub use url::Store;
