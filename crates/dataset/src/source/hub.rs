//! Datasets on the Hugging Face Hub, read where they lie.

use std::sync::Arc;

use serde_json::json;
use updraft_store::hub::{HubClient, RepoFile, RepoRef, ResolvedRepo};

use super::files::{DataFile, Files, Kind};
use super::resolve::{SourceOptions, choose};
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
    Files::on_hub(&client, &repo, &options.split).await
}

impl Files {
    /// The data files of a split of a Hub dataset, pinned to the commit its revision is now.
    ///
    /// A repository without a file we read, such as one with a loading script, is taken from
    /// the Hub's own Parquet export, if that is whole.
    ///
    /// # Errors
    /// [`Error::NoDataFiles`] if there are none, and the Hub's errors.
    pub async fn on_hub(client: &HubClient, repo: &RepoRef, split: &str) -> Result<Self> {
        let resolved = client.resolve(repo).await?;
        match take(client, &resolved, resolved.files.iter().collect(), split) {
            Err(Error::NoDataFiles { .. }) if !resolved.files.iter().any(is_data) => {}
            found => return found,
        }
        let converted = client.resolve(&repo.clone().at(CONVERTED)).await?;
        let exported = exported(&converted, split)?;
        take(client, &converted, exported, split)
    }
}

fn is_data(file: &RepoFile) -> bool {
    Kind::of(&file.path).is_some()
}

/// The files `default/<split>/0000.parquet`, or those of the only configuration.
fn exported<'a>(repo: &'a ResolvedRepo, split: &str) -> Result<Vec<&'a RepoFile>> {
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
    let config = match configs[..] {
        [only] => only,
        _ if configs.contains(&"default") => "default",
        _ => {
            return Err(missing(format!(
                "one configuration, found {}: fetch the one you want",
                configs.join(", ")
            )));
        }
    };
    if repo
        .files
        .iter()
        .any(|file| file.path.starts_with(&format!("{config}/partial-{split}/")))
    {
        return Err(missing(
            "the whole split: the Hub has exported a part of it only".to_owned(),
        ));
    }
    let folder = format!("{config}/{split}/");
    Ok(repo
        .files
        .iter()
        .filter(|file| file.path.starts_with(&folder))
        .collect())
}

fn take(
    client: &HubClient,
    repo: &ResolvedRepo,
    from: Vec<&RepoFile>,
    split: &str,
) -> Result<Files> {
    let names: Vec<&str> = from.iter().map(|file| file.path.as_str()).collect();
    let chosen = choose(repo.repo.id(), &names, split)?;
    let pinned = Arc::new(ResolvedRepo {
        files: Vec::new(),
        ..repo.clone()
    });
    let (mut files, mut identities) = (Vec::new(), Vec::new());
    for file in from
        .into_iter()
        .filter(|file| chosen.contains(&file.path.as_str()))
    {
        let Some((kind, compression)) = Kind::of(&file.path) else {
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
        identities.push(json!({ "name": file.path, "bytes": file.size, "oid": file.oid }));
    }
    let identity =
        json!({ "hub": repo.repo.id(), "commit": repo.sha, "files": identities, "split": split });
    Ok(Files {
        label: repo.repo.id().to_owned(),
        identity,
        files: files.into(),
    })
}
