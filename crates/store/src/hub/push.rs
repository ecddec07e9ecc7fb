//! Uploading a folder to a repository: one commit, large files by the LFS protocol.
//!
//! Source: <https://huggingface.co/docs/hub/api>, and the Git LFS batch API,
//! <https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue};
use reqwest::{Body, Method, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::HubClient;
use super::local_files::{Local, read_folder, unreadable};
use super::repo::{RepoKind, RepoRef};
use super::request::{header, unexpected};
use crate::{CancelToken, Error, Progress, ProgressSink, Result};

/// Files described in one question; the Hub takes no more.
const FILES_A_QUESTION: usize = 256;
const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// What to upload under which message.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// The commit's message.
    pub message: String,
    /// Whether a repository that does not exist yet is made visible to its owner only.
    pub private: bool,
}

impl Default for PushOptions {
    fn default() -> Self {
        Self {
            message: "Upload by updraft".to_owned(),
            private: true,
        }
    }
}

#[derive(Deserialize)]
struct Modes {
    files: Vec<Mode>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<LfsObject>,
}

#[derive(Deserialize)]
struct LfsObject {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_oid: String,
}

impl HubClient {
    /// Uploads every file of a folder (hidden ones aside) to a repository, which is made if it
    /// does not exist, as one commit on its revision. Returns the commit.
    ///
    /// What an interrupted try has uploaded is not uploaded again: large files are known by their
    /// hash, and the commit comes last.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] without a token that may write, those of reading the folder,
    /// [`Error::Cancelled`], and the Hub's errors as in [`resolve`](Self::resolve).
    pub async fn push_folder(
        &self,
        repo: &RepoRef,
        folder: &Path,
        options: &PushOptions,
        progress: &dyn ProgressSink,
        cancel: &CancelToken,
    ) -> Result<String> {
        let files = read_folder(folder).await?;
        let push = Push {
            client: self,
            repo,
            cancel,
        };
        push.create(options).await?;
        let modes = push.modes(&files).await?;
        let is_lfs = |file: &&Local| {
            // An empty file cannot be a large one: storage takes no empty object.
            file.bytes > 0 && modes.get(&file.path).is_some_and(|mode| mode == "lfs")
        };
        let wanted: Vec<&Local> = files
            .iter()
            .filter(|file| modes.contains_key(&file.path))
            .collect();
        let (large, small): (Vec<&Local>, Vec<&Local>) = wanted.into_iter().partition(is_lfs);
        push.upload(&large, progress).await?;
        push.commit(&small, &large, options).await
    }
}

struct Push<'a> {
    client: &'a HubClient,
    repo: &'a RepoRef,
    cancel: &'a CancelToken,
}

impl Push<'_> {
    async fn create(&self, options: &PushOptions) -> Result<()> {
        let (owner, name) = match self.repo.id().split_once('/') {
            Some((owner, name)) => (Some(owner), name),
            None => (None, self.repo.id()),
        };
        let kind = match self.repo.kind() {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        };
        let body = json!({ "name": name, "organization": owner, "type": kind, "private": options.private });
        let url = self.client.address(["api", "repos", "create"].into_iter());
        let body = Bytes::from(body.to_string());
        let send = || (Body::from(body.clone()), body.len() as u64);
        match self
            .call(Method::POST, &url, json_headers("application/json"), send)
            .await
        {
            Err(Error::UnexpectedAnswer { answer, .. }) if answer.starts_with("409") => Ok(()), // It exists.
            done => done.map(drop),
        }
    }

    /// How each file is to be sent; files that the repository ignores are left out.
    async fn modes(&self, files: &[Local]) -> Result<BTreeMap<String, String>> {
        let url = self
            .client
            .api(self.repo, "preupload", self.repo.revision());
        let mut modes = BTreeMap::new();
        for files in files.chunks(FILES_A_QUESTION) {
            let describe = |file: &Local| json!({ "path": file.path, "size": file.bytes, "sample": STANDARD.encode(&file.sample) });
            let body = json!({ "files": files.iter().map(describe).collect::<Vec<_>>() });
            let answer: Modes = self.ask(&url, &body, "application/json").await?;
            let wanted = answer.files.into_iter().filter(|mode| !mode.should_ignore);
            modes.extend(wanted.map(|mode| (mode.path, mode.upload_mode)));
        }
        Ok(modes)
    }

    /// Sends the large files that the Hub's storage does not hold yet.
    async fn upload(&self, files: &[&Local], progress: &dyn ProgressSink) -> Result<()> {
        let kind = (self.repo.kind() == RepoKind::Dataset).then_some("datasets");
        let mut id: Vec<String> = self.repo.id().split('/').map(str::to_owned).collect();
        if let Some(name) = id.last_mut() {
            name.push_str(".git");
        }
        let parts = kind.into_iter().chain(id.iter().map(String::as_str));
        let url = self
            .client
            .address(parts.chain(["info", "lfs", "objects", "batch"]));
        let (total, mut done) = (files.iter().map(|file| file.bytes).sum(), 0);
        for files in files.chunks(FILES_A_QUESTION) {
            let objects: Vec<Value> = files
                .iter()
                .map(|file| json!({ "oid": file.sha256, "size": file.bytes }))
                .collect();
            let body = json!({
                "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
                "objects": objects, "ref": { "name": self.repo.revision() },
            });
            let batch: Batch = self.ask(&url, &body, LFS_JSON).await?;
            for file in files {
                let object = batch
                    .objects
                    .iter()
                    .find(|object| object.oid == file.sha256);
                let Some(object) = object.filter(|object| object.error.is_none()) else {
                    return Err(self.odd(&url, "no place for one of the files"));
                };
                self.upload_one(file, object.actions.as_ref()).await?;
                done += file.bytes;
                progress.report(&Progress::new("push", done, Some(total), "bytes"));
            }
        }
        Ok(())
    }

    /// Sends one large file, whole or in the parts asked for. No action: it is there already.
    async fn upload_one(&self, file: &Local, actions: Option<&Actions>) -> Result<()> {
        let Some(actions) = actions else {
            return Ok(());
        };
        if let Some(upload) = &actions.upload {
            let url = self.url(&upload.href)?;
            match upload.header.get("chunk_size").and_then(number) {
                None => drop(self.put(file, &url, 0..file.bytes).await?),
                Some(0) => return Err(self.odd(&url, "parts of no size")),
                Some(part_bytes) => self.upload_parts(file, upload, &url, part_bytes).await?,
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({ "oid": file.sha256, "size": file.bytes });
            self.post(&self.url(&verify.href)?, &body, LFS_JSON).await?;
        }
        Ok(())
    }

    async fn upload_parts(
        &self,
        file: &Local,
        upload: &Action,
        complete: &Url,
        part_bytes: u64,
    ) -> Result<()> {
        let mut parts = Vec::new();
        for (number, start) in (1u64..).zip((0..file.bytes).step_by(part_bytes as usize)) {
            let href = upload
                .header
                .iter()
                .find(|(key, _)| key.parse() == Ok(number));
            let Some(href) = href.and_then(|(_, href)| href.as_str()) else {
                return Err(self.odd(complete, "too few parts for one of the files"));
            };
            let end = file.bytes.min(start + part_bytes);
            let headers = self.put(file, &self.url(href)?, start..end).await?;
            let etag = header(&headers, ETAG.as_str()).unwrap_or("");
            parts.push(json!({ "partNumber": number, "etag": etag }));
        }
        self.post(
            complete,
            &json!({ "oid": file.sha256, "parts": parts }),
            LFS_JSON,
        )
        .await
        .map(drop)
    }

    /// The commit, which names every file: small ones with their bytes, large ones by their hash.
    async fn commit(
        &self,
        small: &[&Local],
        large: &[&Local],
        options: &PushOptions,
    ) -> Result<String> {
        let mut lines =
            json!({ "key": "header", "value": { "summary": options.message, "description": "" } })
                .to_string();
        for file in small {
            let bytes = tokio::fs::read(&file.file)
                .await
                .map_err(|error| unreadable(&file.file, error))?;
            let value = json!({ "path": file.path, "content": STANDARD.encode(bytes), "encoding": "base64" });
            lines += &format!("\n{}", json!({ "key": "file", "value": value }));
        }
        for file in large {
            let value = json!({ "path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.bytes });
            lines += &format!("\n{}", json!({ "key": "lfsFile", "value": value }));
        }
        let url = self.client.api(self.repo, "commit", self.repo.revision());
        let body = Bytes::from(lines);
        let send = || (Body::from(body.clone()), body.len() as u64);
        let (_, answer) = self
            .call(
                Method::POST,
                &url,
                json_headers("application/x-ndjson"),
                send,
            )
            .await?;
        self.parse::<Committed>(&url, &answer)
            .map(|committed| committed.commit_oid)
    }

    async fn put(&self, file: &Local, url: &Url, range: std::ops::Range<u64>) -> Result<HeaderMap> {
        let send = || {
            let length = range.end - range.start;
            (
                Body::wrap_stream(super::cache::read(file.file.clone(), range.clone())),
                length,
            )
        };
        Ok(self.call(Method::PUT, url, HeaderMap::new(), send).await?.0)
    }

    async fn post(&self, url: &Url, body: &Value, kind: &'static str) -> Result<Bytes> {
        let body = Bytes::from(body.to_string());
        let send = || (Body::from(body.clone()), body.len() as u64);
        Ok(self
            .call(Method::POST, url, json_headers(kind), send)
            .await?
            .1)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        url: &Url,
        body: &Value,
        kind: &'static str,
    ) -> Result<T> {
        let answer = self.post(url, body, kind).await?;
        self.parse(url, &answer)
    }

    fn parse<T: DeserializeOwned>(&self, url: &Url, answer: &[u8]) -> Result<T> {
        serde_json::from_slice(answer)
            .map_err(|error| self.odd(url, &format!("other JSON than the Hub's ({error})")))
    }

    /// One request with a body, until the caller cancels.
    async fn call(
        &self,
        method: Method,
        url: &Url,
        mut headers: HeaderMap,
        body: impl Fn() -> (Body, u64),
    ) -> Result<(HeaderMap, Bytes)> {
        headers.insert(CONTENT_LENGTH, body().1.into());
        let subject = self.client.subject(self.repo, None, url);
        let sending = async {
            let answer = self
                .client
                .send_with(subject, method, headers, || Some(body()))
                .await?;
            let headers = answer.headers().clone();
            let body = self.client.short_body(answer, url).await?;
            Ok((headers, body))
        };
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Error::Cancelled),
            done = sending => done,
        }
    }

    fn url(&self, href: &str) -> Result<Url> {
        let endpoint = self.client.address(std::iter::empty());
        Url::parse(href).map_err(|_| self.odd(&endpoint, "an address that is none"))
    }

    fn odd(&self, url: &Url, answer: &str) -> Error {
        unexpected(self.client.subject(self.repo, None, url), answer)
    }
}

fn json_headers(kind: &'static str) -> HeaderMap {
    let kind = HeaderValue::from_static(kind);
    HeaderMap::from_iter([(CONTENT_TYPE, kind.clone()), (ACCEPT, kind)])
}

fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}
