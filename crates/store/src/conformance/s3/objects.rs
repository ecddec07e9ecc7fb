//! The server's objects, and what each request does to them.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use super::http::{Reply, Request, decode};
use crate::sha256_hex;

/// Objects on one page of a listing: few, so that every client has to turn pages.
const PAGE: usize = 3;

/// Objects by `bucket/key`, and uploads by their number.
#[derive(Debug, Default)]
pub(super) struct Objects {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    num_uploads: u64,
}

/// Bytes and what tells them from others, which takes too long to be made for every request.
#[derive(Debug)]
struct Object {
    bytes: Bytes,
    etag: String,
}

impl From<Bytes> for Object {
    fn from(bytes: Bytes) -> Self {
        Self {
            etag: etag(&bytes),
            bytes,
        }
    }
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", &sha256_hex(bytes)[..32])
}

impl Objects {
    /// Parts of uploads that were neither completed nor aborted.
    pub(super) fn orphaned_parts(&self) -> usize {
        self.uploads.values().map(BTreeMap::len).sum()
    }

    pub(super) fn answer(&mut self, request: &Request) -> Reply {
        let path = decode(&request.path);
        let path = path.trim_start_matches('/').to_owned();
        let query = |name: &str| request.query.get(name).map(String::as_str);
        match (request.method.as_str(), path.contains('/')) {
            ("GET", false) => self.list(&path, request),
            ("POST", false) if query("delete").is_some() => self.delete_many(&path, request),
            ("PUT", false) => Reply::new(200),
            ("GET" | "HEAD", true) => self.get(&path, request),
            ("PUT", true) => match (query("uploadId"), query("partNumber")) {
                (Some(upload), Some(number)) => self.put_part(upload, number, request),
                _ => self.put(path, request),
            },
            ("POST", true) if query("uploads").is_some() => self.begin(),
            ("POST", true) => self.complete(path, query("uploadId").unwrap_or("")),
            ("DELETE", true) => {
                match query("uploadId") {
                    Some(upload) => drop(self.uploads.remove(upload)),
                    None => drop(self.objects.remove(&path)),
                }
                Reply::new(204)
            }
            _ => Reply::error(400, "InvalidRequest"),
        }
    }

    fn get(&self, path: &str, request: &Request) -> Reply {
        let Some(object) = self.objects.get(path) else {
            return Reply::error(404, "NoSuchKey");
        };
        let Object { bytes, etag } = object;
        if request
            .header("if-match")
            .is_some_and(|wanted| wanted != etag)
        {
            return Reply::error(412, "PreconditionFailed");
        }
        let size = bytes.len();
        let range = request.header("range").and_then(|range| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            let first: usize = first.parse().ok()?;
            Some(first..size.min(last.parse::<usize>().map_or(size, |last| last + 1)))
        });
        let reply = Reply::default()
            .with("etag", etag.clone())
            .with("last-modified", "Sun, 22 Nov 2026 00:00:00 GMT");
        let (status, reply, body) = match range {
            Some(range) if range.start >= size => return Reply::error(416, "InvalidRange"),
            Some(range) => {
                let place = format!("bytes {}-{}/{size}", range.start, range.end - 1);
                (206, reply.with("content-range", place), bytes.slice(range))
            }
            None => (200, reply, bytes.clone()),
        };
        let length = body.len().to_string();
        Reply {
            status,
            ..reply.with("content-length", length).body(body)
        }
    }

    fn put(&mut self, path: String, request: &Request) -> Reply {
        let there = self.objects.get(&path).map(|object| &object.etag);
        let must_be_new = request.header("if-none-match") == Some("*");
        let wanted = request.header("if-match");
        if (must_be_new && there.is_some())
            || (wanted.is_some() && wanted != there.map(String::as_str))
        {
            return Reply::error(412, "PreconditionFailed");
        }
        let object = Object::from(request.body.clone());
        let reply = Reply::new(200).with("etag", object.etag.clone());
        self.objects.insert(path, object);
        reply
    }

    fn begin(&mut self) -> Reply {
        self.num_uploads += 1;
        let id = self.num_uploads.to_string();
        let body = format!(
            "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
        );
        self.uploads.insert(id, BTreeMap::new());
        Reply::new(200).body(body)
    }

    fn put_part(&mut self, upload: &str, number: &str, request: &Request) -> Reply {
        let (Some(parts), Ok(number)) = (self.uploads.get_mut(upload), number.parse()) else {
            return Reply::error(404, "NoSuchUpload");
        };
        parts.insert(number, request.body.clone());
        Reply::new(200).with("etag", etag(&request.body))
    }

    fn complete(&mut self, path: String, upload: &str) -> Reply {
        let Some(parts) = self.uploads.remove(upload) else {
            return Reply::error(404, "NoSuchUpload");
        };
        let mut whole = BytesMut::new();
        parts
            .values()
            .for_each(|part| whole.extend_from_slice(part));
        let object = Object::from(whole.freeze());
        let reply = Reply::new(200).body(format!(
            "<CompleteMultipartUploadResult><ETag>{}</ETag></CompleteMultipartUploadResult>",
            escape(&object.etag)
        ));
        self.objects.insert(path, object);
        reply
    }

    fn delete_many(&mut self, bucket: &str, request: &Request) -> Reply {
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let mut answer = "<DeleteResult>".to_owned();
        for key in body
            .split("<Key>")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once("</Key>")?.0))
        {
            self.objects.remove(&format!("{bucket}/{}", unescape(key)));
            answer += &format!("<Deleted><Key>{key}</Key></Deleted>");
        }
        Reply::new(200).body(answer + "</DeleteResult>")
    }

    fn list(&self, bucket: &str, request: &Request) -> Reply {
        let query = |name: &str| request.query.get(name).map_or("", String::as_str);
        let (prefix, after) = (query("prefix"), query("continuation-token"));
        let in_bucket = self.objects.iter().filter_map(|(path, object)| {
            let key = path.strip_prefix(bucket)?.strip_prefix('/')?;
            (key.starts_with(prefix) && key > after).then_some((key, object))
        });
        let found: Vec<_> = in_bucket.take(PAGE + 1).collect();
        let is_cut = found.len() > PAGE;
        let mut body = format!("<ListBucketResult><IsTruncated>{is_cut}</IsTruncated>");
        for (key, object) in found.iter().take(PAGE) {
            let (key, etag, size) = (escape(key), escape(&object.etag), object.bytes.len());
            body += &format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-22T00:00:00.000Z</LastModified><ETag>{etag}</ETag><Size>{size}</Size></Contents>"
            );
        }
        if let Some((last, _)) = found.get(PAGE - 1).filter(|_| is_cut) {
            body += &format!(
                "<NextContinuationToken>{}</NextContinuationToken>",
                escape(last)
            );
        }
        Reply::new(200).body(body + "</ListBucketResult>")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;")
}

fn unescape(text: &str) -> String {
    text.replace("&quot;", "\"")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
}
