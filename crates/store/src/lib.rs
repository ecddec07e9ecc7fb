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
//!
//! # What is where
//!
//! - [`Store`]: one URL, opened; objects by path, create-only writes whose outcome is always known.
//! - [`layout`]: [`StageId`] and the areas; [`StageKey`]: the hash of the inputs.
//! - [`open_stage`], [`StageWriter`], [`FinishedStage`], [`Manifest`], [`JournalEntry`]: the commit
//!   protocol; [`garbage`]: what no manifest lists.
//! - [`fetch`]: downloads that go on where they broke off; `hub`: the Hugging Face Hub.
//! - [`progress`] and [`cancel`]: what every stage takes from its caller.
//!
//! There is no storage trait here: a store is an [`object_store::ObjectStore`]. Nothing here knows
//! of Parquet, Arrow or tensors, and nothing locks: processes that make one stage at once agree
//! because equal inputs make equal bytes and the first manifest stands.
//!
//! On `file://` each write flushes the file and its folder before it returns, so what a manifest
//! lists survives a power cut whenever the manifest does.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! | --- | --- | --- |
//! | `fs` | yes | folders and `file://` |
//! | `s3` | yes | `s3://`: AWS, Tigris, MinIO, Garage |
//! | `gs`, `az` | no | `gs://` and `az://`: Google Cloud Storage, Azure Blob Storage |
//! | `hub` | yes | the Hugging Face Hub read client |
//! | `push` | no | uploading a folder to a Hub repository |
//! | `conformance` | no | `faults` and `conformance`, for tests of stages |

mod error;

mod url;

mod object;
mod object_writer;

#[cfg(feature = "az")]
mod az;
#[cfg(any(feature = "s3", feature = "gs", feature = "az"))]
mod cloud;
#[cfg(feature = "gs")]
mod gs;
#[cfg(any(feature = "s3", feature = "gs", feature = "az"))]
mod patience;
#[cfg(feature = "s3")]
mod s3;
#[cfg(any(feature = "s3", feature = "gs", feature = "az", feature = "hub"))]
mod tls;

pub mod layout;
mod stage_key;

mod hashed;

mod manifest;

mod journal;

mod commit;
mod finished;
mod garbage;
mod staging;

mod download;
pub mod fetch;
mod file_hash;
#[cfg(feature = "hub")]
pub mod hub;

pub mod cancel;
pub mod progress;

#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "conformance")]
pub mod faults;
#[cfg(feature = "conformance")]
pub mod sink;

pub use cancel::CancelToken;
pub use commit::{Opened, StageObjectWriter, StageWriter, open_stage};
pub use error::{BoxError, Error, Result};
pub use file_hash::{FileHash, FileHashes};
pub use finished::{FinishedStage, current, finished};
pub use garbage::garbage;
pub use hashed::Hashed;
pub use journal::JournalEntry;
pub use layout::{Area, StageId};
pub use manifest::{FORMAT_VERSION, Manifest, ManifestDraft, ObjectEntry, Reject};
pub use object::{Created, ObjectInfo};
pub use object_writer::ObjectWriter;
pub use progress::{NoProgress, Progress, ProgressSink};
pub use stage_key::{StageKey, sha256_hex};
pub use url::Store;
