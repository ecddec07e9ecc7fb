//! One stable URL in front of replicas: bodies stream both ways, and a request is tried again only while
//! no byte of an answer has been seen.

mod upload;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use self::upload::{Attempt, Upload};
use super::LoadBalancing;
use crate::error::{BoxError, Error, Result};

/// How long a replica may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Headers that speak of one connection, not of the message.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
];

type AnyBody = UnsyncBoxBody<Bytes, BoxError>;

/// How a gateway behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct GatewayOptions {
    /// Which replica gets the next request.
    pub load_balancing: LoadBalancing,
    /// How long a replica may take until its response begins, the time for which the client is slow to
    /// send its request left out; for ever when `None`.
    pub first_byte: Option<Duration>,
}

/// A running gateway; it ends when it is dropped.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    table: Arc<Table>,
    accepting: JoinHandle<()>,
}

/// The replicas that get requests.
#[derive(Debug)]
struct Table {
    options: GatewayOptions,
    routes: RwLock<Vec<Arc<Route>>>,
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Route {
    id: u32,
    address: SocketAddr,
    in_flight: AtomicUsize,
}

/// A request under way on a route.
struct InFlight(Arc<Route>);

impl InFlight {
    fn on(route: &Arc<Route>) -> Self {
        route.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(route.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gateway {
    /// Listens on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`Error::Transport`] if the address cannot be had.
    pub async fn bind(address: SocketAddr, options: GatewayOptions) -> Result<Self> {
        let failed = |error: std::io::Error| Error::Transport {
            host: address.to_string(),
            source: error.into(),
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let table = Arc::new(Table {
            options,
            routes: RwLock::default(),
            turn: AtomicUsize::new(0),
        });
        let accepting = tokio::spawn(accept(listener, table.clone()));
        Ok(Self {
            address: bound,
            table,
            accepting,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the replicas that get requests. Requests under way on others are finished.
    pub fn route(&self, replicas: &[(u32, SocketAddr)]) {
        let mut routes = self
            .table
            .routes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::take(&mut *routes);
        for &(id, address) in replicas {
            let known = old
                .iter()
                .find(|route| route.id == id && route.address == address);
            routes.push(known.cloned().unwrap_or_else(|| {
                Arc::new(Route {
                    id,
                    address,
                    in_flight: AtomicUsize::new(0),
                })
            }));
        }
    }

    /// Takes a replica out; the watch says how many of its requests are still under way.
    pub fn withdraw(&self, id: u32) -> Option<Withdrawn> {
        let mut routes = self
            .table
            .routes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let index = routes.iter().position(|route| route.id == id)?;
        Some(Withdrawn(routes.remove(index)))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A replica that gets no more requests.
#[derive(Debug)]
pub struct Withdrawn(Arc<Route>);

impl Withdrawn {
    /// The requests that are still under way on it.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, table: Arc<Table>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of files, most often: those under way must end first.
                tracing::warn!(%error, "could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let table = table.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let table = table.clone();
                async move { Ok::<_, Infallible>(answer(&table, request).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection broke");
            }
        });
    }
}

async fn answer(table: &Table, request: Request<Incoming>) -> Response<AnyBody> {
    let (mut parts, body) = request.into_parts();
    strip(&mut parts.headers);
    // How long the body is, is said by the body.
    parts.headers.remove(header::TRANSFER_ENCODING);
    parts.headers.remove(header::EXPECT); // answered here
    let upload = Upload::new(body);
    let mut tried = Vec::new();
    while let Some(route) = table.pick(&tried) {
        let in_flight = InFlight::on(&route);
        let mut copy = Request::new(upload.attempt());
        *copy.method_mut() = parts.method.clone();
        *copy.uri_mut() = parts.uri.clone();
        *copy.headers_mut() = parts.headers.clone();
        let begun = exchange(route.address, copy);
        let response = match table.options.first_byte {
            Some(limit) => tokio::select! {
                response = begun => response,
                () = upload.owed_for(limit) => Err("no answer in time".into()),
            },
            None => begun.await,
        };
        match response {
            Ok(response) => return stream(response, in_flight),
            Err(_) if upload.is_broken() => {
                return plain(StatusCode::BAD_REQUEST, "the request's body broke off");
            }
            Err(error) if !upload.can_be_repeated() => {
                tracing::warn!(replica = route.id, %error, "no answer to a request too large to repeat");
                return plain(
                    StatusCode::BAD_GATEWAY,
                    "the replica has not answered, and the request was too large to be kept for another; try again later",
                );
            }
            Err(error) => {
                tracing::warn!(replica = route.id, %error, "no answer; the next replica is asked");
                tried.push(route.id);
            }
        }
    }
    match tried.is_empty() {
        true => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "no replica is ready; try again later",
        ),
        false => plain(
            StatusCode::BAD_GATEWAY,
            "no replica has answered; try again later",
        ),
    }
}

impl Table {
    /// The next replica that is not among those `tried`.
    fn pick(&self, tried: &[u32]) -> Option<Arc<Route>> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let open: Vec<_> = routes
            .iter()
            .filter(|route| !tried.contains(&route.id))
            .collect();
        let count = open.len().max(1);
        // Turns break ties, or the first would get every request of a quiet service.
        let mut turned = open.iter().cycle().skip(turn % count).take(open.len());
        let picked = match self.options.load_balancing {
            LoadBalancing::RoundRobin => turned.next(),
            LoadBalancing::LeastLoad => {
                turned.min_by_key(|route| route.in_flight.load(Ordering::Relaxed))
            }
        };
        picked.map(|route| Arc::clone(route))
    }
}

/// Sends a request on a connection of its own and waits for the head of the answer.
async fn exchange(
    address: SocketAddr,
    request: Request<Attempt>,
) -> Result<Response<Incoming>, BoxError> {
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await??;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a replica's connection broke");
        }
    });
    Ok(sender.send_request(request).await?)
}

/// Passes an answer on as it comes; the replica counts as loaded until its last byte.
fn stream(response: Response<Incoming>, in_flight: InFlight) -> Response<AnyBody> {
    let (mut parts, body) = response.into_parts();
    strip(&mut parts.headers);
    // An exact length is kept by hyper; a chunked answer stays chunked.
    if body.size_hint().exact().is_none() {
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    parts.headers.remove(header::TRANSFER_ENCODING);
    let body = body.map_frame(move |frame| {
        let _counted = &in_flight;
        frame
    });
    Response::from_parts(parts, body.map_err(BoxError::from).boxed_unsync())
}

fn plain(status: StatusCode, text: &'static str) -> Response<AnyBody> {
    let body = Full::new(Bytes::from_static(text.as_bytes()));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn strip(headers: &mut HeaderMap) {
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}

#[cfg(test)]
mod tests;
