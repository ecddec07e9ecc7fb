//! The Hub read client.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use reqwest::header::{AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Body, Client, Method, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use tokio::time::Instant;

use super::body::{check_content_range, skip_bytes, unless_silent};
use super::cache::Cache;
use super::config::HubConfig;
use super::repo::{RepoFile, RepoKind, RepoRef, ResolvedRepo, TreeItem};
use super::request::{
    Detour, Subject, decide, header, next_page, reconnect, unexpected, unreachable,
};
use crate::fetch::{self, Part};
use crate::{BoxError, Error, Result};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How many redirects one request may take.
const MOST_REDIRECTS: usize = 8;
/// How many pages of a listing are read; the Hub sends a thousand files on each.
const MOST_PAGES: usize = 1_000;
/// Whole files larger than one piece are read several pieces at a time.
const PIECE_BYTES: u64 = 8 << 20;
const PIECES_AT_ONCE: usize = 8;
/// The slowest link a body may go out by, in bytes per second.
const SLOWEST_UPLOAD: u64 = 64 << 10;
/// How many times the longest silence the server may take to make good what was sent.
const STALLS_OF_A_WRITE: u32 = 4;

/// Reads repositories of a Hub. Clones share connections.
#[derive(Clone, Debug)]
pub struct HubClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    http: Client,
    endpoint: Url,
    config: HubConfig,
    cache: Option<Cache>,
}

#[derive(Deserialize)]
struct RevisionInfo {
    sha: String,
}

impl HubClient {
    /// A client for this configuration. Makes no request yet.
    ///
    /// # Errors
    /// [`Error::InvalidUrl`] if the endpoint is no URL or holds credentials.
    pub fn new(config: HubConfig) -> Result<Self> {
        let invalid = |reason: &str| Error::InvalidUrl {
            url: "HF_ENDPOINT".to_owned(),
            reason: reason.to_owned(),
        };
        let endpoint = Url::parse(&config.endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| invalid("write it as https://host"))?;
        if !endpoint.username().is_empty() || endpoint.password().is_some() {
            return Err(invalid("credentials belong in HF_TOKEN, not in the URL"));
        }
        crate::tls::install();
        let http = Client::builder()
            .user_agent(concat!("updraft/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|error| invalid(&format!("no TLS for it ({error})")))?;
        let cache = config.cache.clone().map(Cache::new);
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                endpoint,
                config,
                cache,
            }),
        })
    }

    /// A client configured from the environment; see [`HubConfig::from_env`].
    ///
    /// # Errors
    /// Those of [`HubConfig::from_env`] and [`new`](Self::new).
    pub fn from_env() -> Result<Self> {
        Self::new(HubConfig::from_env()?)
    }

    /// Pins a repository's revision to the commit it is now, and lists that commit's files.
    /// Offline, the commit and the files are those of the cache.
    ///
    /// # Errors
    /// [`Error::Gated`], [`Error::RepoNotFound`], [`Error::RevisionNotFound`], [`Error::Unauthenticated`],
    /// [`Error::RateLimited`], [`Error::Offline`], [`Error::PartlyCached`], [`Error::Unreachable`] or
    /// [`Error::UnexpectedAnswer`].
    pub async fn resolve(&self, repo: &RepoRef) -> Result<ResolvedRepo> {
        let url = self.api(repo, "revision", repo.revision());
        if self.inner.config.offline {
            let cached = match &self.inner.cache {
                Some(cache) => cache.resolve(repo, self.inner.config.partial_cache)?,
                None => None,
            };
            return cached.ok_or_else(|| Error::Offline { url: url.into() });
        }
        let (_, info): (_, RevisionInfo) = self.json(repo, url).await?;
        let mut url = self.api(repo, "tree", &info.sha);
        url.set_query(Some("recursive=true"));
        let mut files = Vec::new();
        for _ in 0..MOST_PAGES {
            let (headers, page): (_, Vec<TreeItem>) = self.json(repo, url.clone()).await?;
            for item in page {
                let file = item.into_file().map_err(|path| {
                    let answer = format!("a path that leads out of the repository, '{path}'");
                    unexpected(self.subject(repo, None, &url), &answer)
                })?;
                files.extend(file);
            }
            match next_page(&headers, &url) {
                Some(next) => url = next,
                None => {
                    files.sort_by(|a: &RepoFile, b| a.path.cmp(&b.path));
                    return Ok(ResolvedRepo {
                        repo: repo.clone(),
                        sha: info.sha,
                        files,
                    });
                }
            }
        }
        Err(unexpected(
            self.subject(repo, None, &url),
            "a listing without end",
        ))
    }

    /// The bytes of a range of a file, from the cache if that holds it, else from the Hub, resumed
    /// where a connection breaks off.
    pub fn read(
        &self,
        repo: &ResolvedRepo,
        file: &RepoFile,
        range: Range<u64>,
    ) -> BoxStream<'static, Result<Bytes>> {
        let range = range.start..range.end.min(file.size);
        let cached = self.inner.cache.as_ref();
        if let Some(path) = cached.and_then(|cache| cache.file(&repo.repo, &repo.sha, file)) {
            return super::cache::read(path, range).boxed();
        }
        let target = Arc::new((self.clone(), repo.clone_without_files(), file.clone()));
        let url = self.file_url(repo, file).to_string();
        fetch::resumable(url, range, move |range, etag| {
            let target = Arc::clone(&target);
            async move {
                let (client, repo, file) = &*target;
                client.open(repo, file, range, etag.as_deref()).await
            }
        })
        .boxed()
    }

    /// [`read`](Self::read) by several requests at a time if the range is large, which holds up
    /// to 64 MiB in memory. The bytes come in order.
    pub fn read_in_pieces(
        &self,
        repo: &ResolvedRepo,
        file: &RepoFile,
        range: Range<u64>,
    ) -> BoxStream<'static, Result<Bytes>> {
        let range = range.start..range.end.min(file.size);
        if range.end.saturating_sub(range.start) <= PIECE_BYTES {
            return self.read(repo, file, range);
        }
        let (client, repo, file) = (self.clone(), repo.clone_without_files(), file.clone());
        let read = move |range| client.read(&repo, &file, range);
        fetch::in_pieces(range, PIECE_BYTES, PIECES_AT_ONCE, read).boxed()
    }

    /// The bytes of a whole file, in order, [checked](Self::checked); a large one by several
    /// requests at a time.
    pub fn read_all(
        &self,
        repo: &ResolvedRepo,
        file: &RepoFile,
    ) -> BoxStream<'static, Result<Bytes>> {
        self.checked(repo, file, self.read_in_pieces(repo, file, 0..file.size))
    }

    /// Passes the bytes of a whole file on, wherever they come from, and ends with
    /// [`Error::Corrupt`] if they are not those the listing means: by their SHA-256 where it is
    /// listed, else by Git's name of them.
    pub fn checked(
        &self,
        repo: &ResolvedRepo,
        file: &RepoFile,
        body: BoxStream<'static, Result<Bytes>>,
    ) -> BoxStream<'static, Result<Bytes>> {
        super::content::checked(self.file_url(repo, file).to_string(), file, body)
    }

    /// Asks for a range of one version of a file.
    async fn open(
        &self,
        repo: &ResolvedRepo,
        file: &RepoFile,
        range: Range<u64>,
        etag: Option<&str>,
    ) -> Result<Part> {
        let url = self.file_url(repo, file);
        let subject = self.subject(&repo.repo, Some(&file.path), &url);
        let mut headers = HeaderMap::new();
        let bytes = format!("bytes={}-{}", range.start, range.end - 1);
        headers.insert(RANGE, HeaderValue::from_str(&bytes).expect("digits"));
        // A weak tag may not stand in If-Range; the tag of the answer is compared all the same.
        if let Some(value) = etag
            .filter(|etag| !etag.starts_with("W/"))
            .and_then(|etag| etag.parse().ok())
        {
            headers.insert(IF_RANGE, value);
        }
        let answer = self.send(subject, headers).await?;
        let skip = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                check_content_range(&answer, &range, file)
                    .map_err(|answer| unexpected(subject, &answer))?;
                0
            }
            // The server ignores ranges, or the version is another: the tag will tell.
            StatusCode::OK => range.start,
            _ => return Err(Error::Changed { url: url.into() }),
        };
        let etag = header(answer.headers(), ETAG.as_str()).map(str::to_owned);
        let body = answer
            .bytes_stream()
            .map_err(|error| BoxError::from(error.without_url()));
        Ok(Part {
            etag,
            bytes: skip_bytes(unless_silent(body.boxed(), self.inner.config.stall), skip),
        })
    }

    async fn json<T: for<'de> Deserialize<'de>>(
        &self,
        repo: &RepoRef,
        url: Url,
    ) -> Result<(HeaderMap, T)> {
        let subject = self.subject(repo, None, &url);
        let answer = self.send(subject, HeaderMap::new()).await?;
        let headers = answer.headers().clone();
        let body = self.short_body(answer, &url).await?;
        let value = serde_json::from_slice(&body).map_err(|error| {
            unexpected(subject, &format!("other JSON than the Hub's ({error})"))
        })?;
        Ok((headers, value))
    }

    /// The body of an answer that is no file's.
    pub(super) async fn short_body(&self, answer: Response, url: &Url) -> Result<Bytes> {
        tokio::time::timeout(self.inner.config.deadline, answer.bytes())
            .await
            .map_err(|elapsed| unreachable(url, elapsed))?
            .map_err(|error| unreachable(url, error.without_url()))
    }

    /// Sends one GET, following redirects and waiting as asked, within the deadline.
    async fn send(&self, subject: Subject<'_>, headers: HeaderMap) -> Result<Response> {
        self.send_with(subject, Method::GET, headers, || None).await
    }

    /// [`send`](Self::send) of any request; `body` makes its body of so many bytes anew for every
    /// try. While that goes out no answer can come, so the deadlines allow for it.
    pub(super) async fn send_with(
        &self,
        subject: Subject<'_>,
        method: Method,
        headers: HeaderMap,
        body: impl Fn() -> Option<(Body, u64)>,
    ) -> Result<Response> {
        if self.inner.config.offline {
            return Err(Error::Offline {
                url: subject.url.to_string(),
            });
        }
        let (stall, mut deadline) = (
            self.inner.config.stall,
            Instant::now() + self.inner.config.deadline,
        );
        let mut url = subject.url.clone();
        let (mut failed, mut redirects) = (0, 0);
        loop {
            let mut request = self
                .inner
                .http
                .request(method.clone(), url.clone())
                .headers(self.with_token(&url, &headers));
            let mut silence = stall;
            if let Some((body, bytes)) = body() {
                request = request.body(body);
                let sending = Duration::from_secs(bytes / SLOWEST_UPLOAD);
                silence = STALLS_OF_A_WRITE * stall + sending;
                deadline += sending;
            }
            let until = deadline.min(Instant::now() + silence);
            let answer = tokio::time::timeout_at(until, request.send()).await;
            let detour = match answer {
                Err(elapsed) => reconnect(elapsed, failed, subject)?,
                // The address it failed at may be a signed one.
                Ok(Err(error)) => reconnect(error.without_url(), failed, subject)?,
                Ok(Ok(answer)) => {
                    match decide(answer.status(), answer.headers(), &url, failed, subject)? {
                        None => return Ok(answer),
                        Some(detour) => detour,
                    }
                }
            };
            let (wait, otherwise) = match detour {
                Detour::Follow(_) if redirects == MOST_REDIRECTS => {
                    return Err(unexpected(subject, "redirects without end"));
                }
                Detour::Follow(target) => {
                    url = target;
                    redirects += 1;
                    continue;
                }
                Detour::Wait { wait, otherwise } => (wait, otherwise),
            };
            if Instant::now() + wait >= deadline {
                return Err(otherwise);
            }
            tracing::debug!(url = %subject.url, ?wait, "waiting for the Hub");
            tokio::time::sleep(wait).await;
            // A signed address may expire while we wait, so start again from the Hub's own.
            url = subject.url.clone();
            redirects = 0;
            failed += 1;
        }
    }

    /// The headers, with the token if and only if the address is the Hub's own.
    fn with_token(&self, url: &Url, headers: &HeaderMap) -> HeaderMap {
        let mut headers = headers.clone();
        if url.origin() == self.inner.endpoint.origin()
            && let Some(token) = &self.inner.config.token
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
        {
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        headers
    }

    pub(super) fn subject<'a>(
        &self,
        repo: &'a RepoRef,
        path: Option<&'a str>,
        url: &'a Url,
    ) -> Subject<'a> {
        Subject {
            repo,
            path,
            url,
            has_token: self.inner.config.token.is_some(),
        }
    }

    /// `{endpoint}/api/{kind}s/{id}/{what}/{revision}`.
    pub(super) fn api(&self, repo: &RepoRef, what: &str, revision: &str) -> Url {
        let parts = ["api", repo.kind().plural()].into_iter();
        self.address(parts.chain(repo.id().split('/')).chain([what, revision]))
    }

    /// `{endpoint}/[datasets/]{id}/resolve/{sha}/{path}`.
    fn file_url(&self, repo: &ResolvedRepo, file: &RepoFile) -> Url {
        let kind = (repo.repo.kind() == RepoKind::Dataset).then_some("datasets");
        let id = repo.repo.id().split('/');
        let path = file.path.split('/');
        self.address(
            kind.into_iter()
                .chain(id)
                .chain(["resolve", &repo.sha])
                .chain(path),
        )
    }

    /// The endpoint with these path parts, each percent-encoded, slashes included.
    pub(super) fn address<'a>(&self, parts: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.inner.endpoint.clone();
        url.path_segments_mut()
            .expect("http and https URLs have a path")
            .pop_if_empty()
            .extend(parts);
        url
    }
}

impl ResolvedRepo {
    /// The same commit; its list of files may be long and a reader of one needs none of it.
    fn clone_without_files(&self) -> Self {
        Self {
            repo: self.repo.clone(),
            sha: self.sha.clone(),
            files: Vec::new(),
        }
    }
}
