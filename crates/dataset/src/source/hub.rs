//! Datasets on the Hugging Face Hub, read where they lie.

use std::collections::HashMap;
use std::sync::Arc;

use futures::TryStreamExt as _;
use serde_json::json;
use updraft_store::hub::{HubClient, RepoFile, RepoRef, ResolvedRepo};

use super::card::CARD;
use super::choose::{choose, is_data};
use super::files::{DataFile, Files, Kind};
use super::resolve::SourceOptions;
use crate::location::{Location, Remote};
use crate::{Error, Result};

/// The branch where the Hub keeps its own Parquet export of a dataset.
const CONVERTED: &str = "refs/convert/parquet";

/// Whether a name can be a Hub dataset's and cannot be meant as a file.
pub(super) fn is_repo_name(spec: &str) -> bool {
    spec.split('/').count() == 2 && Kind::of(spec).is_none() && RepoRef::dataset(spec).is_ok()
}

/// The dataset `owner/name`, with the client that the environment describes.
pub(super) async fn resolve(spec: &str, options: &SourceOptions) -> Result<Files> {
    let client = HubClient::from_env()?;
    let repo = RepoRef::dataset(spec)?.at(&options.revision);
    Files::on_hub(&client, &repo, options).await
}

impl Files {
    /// The data files of a split of a Hub dataset, pinned to the commit its revision is now.
    ///
    /// The dataset card's `configs` say which files these are, or else the files' names. A
    /// repository without a file we read, such as one with a loading script, is taken from
    /// the Hub's own Parquet export of `main`, if that is whole or a part of it is asked for.
    ///
    /// # Errors
    /// [`Error::NoDataFiles`] if there are none, and the Hub's errors.
    pub async fn on_hub(
        client: &HubClient,
        repo: &RepoRef,
        options: &SourceOptions,
    ) -> Result<Self> {
        let resolved = client.resolve(repo).await?;
        if resolved.files.iter().any(|file| is_data(&file.path)) {
            let names: Vec<&str> = resolved
                .files
                .iter()
                .map(|file| file.path.as_str())
                .collect();
            let card = card(client, &resolved).await?;
            let chosen = choose(repo.id(), &names, card.as_deref(), options)?;
            return Ok(take(client, &resolved, &chosen));
        }
        if repo.revision() != SourceOptions::default().revision {
            return Err(Error::NoDataFiles {
                spec: repo.to_string(),
                expected: format!(
                    "one at the revision {}: the Hub exports main only; take main, or a revision with data files",
                    repo.revision()
                ),
            });
        }
        let converted = client.resolve(&repo.clone().at(CONVERTED)).await?;
        let chosen = exported(&converted, options)?;
        Ok(take(client, &converted, &chosen))
    }
}

/// The text of the dataset card.
async fn card(client: &HubClient, repo: &ResolvedRepo) -> Result<Option<String>> {
    let Some(file) = repo.files.iter().find(|file| file.path == CARD) else {
        return Ok(None);
    };
    let bytes: Vec<bytes::Bytes> = client.read(repo, file, 0..file.size).try_collect().await?;
    Ok(Some(String::from_utf8_lossy(&bytes.concat()).into_owned()))
}

/// The files `<config>/<split>/0000.parquet` of the configuration asked for, the default one or
/// the only one.
fn exported<'a>(repo: &'a ResolvedRepo, options: &SourceOptions) -> Result<Vec<&'a str>> {
    let missing = |expected: String| Error::NoDataFiles {
        spec: repo.repo.id().to_owned(),
        expected,
    };
    let mut configs: Vec<&str> = repo
        .files
        .iter()
        .filter_map(|file| Some(file.path.split_once('/')?.0))
        .collect();
    configs.dedup();
    let wanted = options.config.as_deref().unwrap_or("default");
    let config = match configs[..] {
        [only] if options.config.is_none() => only,
        _ if configs.contains(&wanted) => wanted,
        _ => {
            let names = configs.join(", ");
            return Err(missing(format!("one configuration; name one of {names}")));
        }
    };
    let below = |folder: String| -> Vec<&str> {
        let paths = repo.files.iter().map(|file| file.path.as_str());
        paths.filter(|path| path.starts_with(&folder)).collect()
    };
    let (split, part) = (
        &options.split,
        below(format!("{config}/partial-{}/", options.split)),
    );
    let whole = below(format!("{config}/{split}/"));
    match (whole.is_empty(), part.is_empty(), options.partial_export) {
        (false, ..) => Ok(whole),
        (true, false, true) => Ok(part),
        (true, false, false) => Err(missing(
            "the whole split: the Hub has exported a part of it only; ask for the partial export to take that".to_owned(),
        )),
        (true, true, _) => Err(missing(format!("an export of the split '{split}'; choose another split"))),
    }
}

fn take(client: &HubClient, repo: &ResolvedRepo, chosen: &[&str]) -> Files {
    let pinned = Arc::new(ResolvedRepo {
        files: Vec::new(),
        ..repo.clone()
    });
    let (mut files, mut identities) = (Vec::new(), Vec::new());
    let by_name: HashMap<&str, &RepoFile> = (repo.files.iter())
        .map(|file| (file.path.as_str(), file))
        .collect();
    for name in chosen {
        let found = by_name.get(name).copied();
        let (Some(file), Some((kind, compression))) = (found, Kind::of(name)) else {
            continue;
        };
        let remote = Remote::Hub {
            client: client.clone(),
            repo: Arc::clone(&pinned),
            file: file.clone(),
        };
        files.push(DataFile {
            name: file.path.as_str().into(),
            location: Location::Remote(remote),
            size: file.size,
            kind,
            compression,
        });
        identities.push(json!({ "name": file.path, "bytes": file.size, "id": file.content_id() }));
    }
    Files {
        label: repo.repo.id().to_owned(),
        identity: json!({ "hub": repo.repo.id(), "commit": repo.sha, "files": identities }),
        files: files.into(),
    }
}
