//! containerd's snapshot service over a Unix socket: gRPC requests in, answers of a [`Snapshotter`] out.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use prost_types::Timestamp;
use tokio::net::UnixListener;
use tonic::body::Body;
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

use super::error::SnapshotError;
use super::filter::SnapshotFilters;
use super::messages::{
    CleanupRequest, CommitRequest, CreateRequest, InfoMessage, InfoResponse, KeyRequest, KindMessage, ListRequest,
    ListResponse, MountMessage, MountsResponse, NoContent, UpdateRequest, UsageResponse,
};
use super::record::{SnapshotKind, SnapshotRecord};
use super::service::Snapshotter;
use super::step::MountStep;

/// Path of the service's methods. The name of the method follows.
const SERVICE: &str = "/containerd.services.snapshots.v1.Snapshots/";
/// Snapshots in one message of a list. A message has at most 4 MiB, and a snapshot's labels can have some KiB each.
const LISTED: usize = 100;
/// Pause after a connection could not be accepted, as for lack of file handles. A shorter one would use much processor
/// time for nothing; a longer one delays clients.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until this is dropped.
pub async fn serve(listener: UnixListener, snapshotter: Arc<Snapshotter>) -> Infallible {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let snapshotter = snapshotter.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(snapshotter.clone(), request).map(Ok::<_, Infallible>));
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

/// Answers one request.
async fn answer(snapshotter: Arc<Snapshotter>, request: HttpRequest<Incoming>) -> HttpResponse<Body> {
    let name = request
        .uri()
        .path()
        .strip_prefix(SERVICE)
        .unwrap_or_default()
        .to_owned();
    match name.as_str() {
        "Prepare" => unary(request, |asked| prepare(snapshotter, asked)).await,
        "View" => unary(request, |asked| view(snapshotter, asked)).await,
        "Mounts" => unary(request, |asked| mounts(snapshotter, asked)).await,
        "Commit" => unary(request, |asked| commit(snapshotter, asked)).await,
        "Remove" => unary(request, |asked| remove(snapshotter, asked)).await,
        "Stat" => unary(request, |asked| stat(snapshotter, asked)).await,
        "Update" => unary(request, |asked| update(snapshotter, asked)).await,
        "Usage" => unary(request, |asked| usage(snapshotter, asked)).await,
        "Cleanup" => unary(request, |asked| cleanup(snapshotter, asked)).await,
        "List" => {
            let mut grpc = Grpc::new(ProstCodec::<ListResponse, ListRequest>::default());
            grpc.server_streaming(Listing(snapshotter), request).await
        }
        _ => Status::unimplemented(format!("there is no method {name:?}")).into_http(),
    }
}

async fn prepare(snapshotter: Arc<Snapshotter>, asked: CreateRequest) -> Result<MountsResponse, SnapshotError> {
    let steps = snapshotter.prepare(&asked.key, named(&asked.parent), asked.labels.clone());
    Ok(mount_messages(steps.await?))
}

async fn view(snapshotter: Arc<Snapshotter>, asked: CreateRequest) -> Result<MountsResponse, SnapshotError> {
    let steps = snapshotter.view(&asked.key, named(&asked.parent), asked.labels.clone());
    Ok(mount_messages(steps.await?))
}

async fn mounts(snapshotter: Arc<Snapshotter>, asked: KeyRequest) -> Result<MountsResponse, SnapshotError> {
    Ok(mount_messages(snapshotter.mounts(&asked.key).await?))
}

async fn commit(snapshotter: Arc<Snapshotter>, asked: CommitRequest) -> Result<NoContent, SnapshotError> {
    snapshotter.commit(&asked.name, &asked.key, asked.labels).await?;
    Ok(NoContent {})
}

async fn remove(snapshotter: Arc<Snapshotter>, asked: KeyRequest) -> Result<NoContent, SnapshotError> {
    snapshotter.remove(&asked.key).await?;
    Ok(NoContent {})
}

async fn stat(snapshotter: Arc<Snapshotter>, asked: KeyRequest) -> Result<InfoResponse, SnapshotError> {
    let info = Some(info_message(snapshotter.stat(&asked.key)?));
    Ok(InfoResponse { info })
}

async fn update(snapshotter: Arc<Snapshotter>, asked: UpdateRequest) -> Result<InfoResponse, SnapshotError> {
    let info = asked.info.unwrap_or_default();
    let fields = asked.update_mask.unwrap_or_default().paths;
    let info = Some(info_message(snapshotter.update(&info.name, &info.labels, &fields)?));
    Ok(InfoResponse { info })
}

async fn usage(snapshotter: Arc<Snapshotter>, asked: KeyRequest) -> Result<UsageResponse, SnapshotError> {
    let usage = snapshotter.usage(&asked.key).await?;
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    Ok(UsageResponse {
        size: signed(usage.size),
        inodes: signed(usage.inodes),
    })
}

async fn cleanup(snapshotter: Arc<Snapshotter>, _: CleanupRequest) -> Result<NoContent, SnapshotError> {
    snapshotter.cleanup().await?;
    Ok(NoContent {})
}

/// Answers a request of one message with one message.
async fn unary<Q, A, W>(request: HttpRequest<Incoming>, call: impl FnOnce(Q) -> W) -> HttpResponse<Body>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    W: Future<Output = Result<A, SnapshotError>> + Send + 'static,
{
    let mut grpc = Grpc::new(ProstCodec::<A, Q>::default());
    grpc.unary(Unary(Some(call)), request).await
}

/// A method that is called once.
struct Unary<C>(Option<C>);

impl<C, Q, A, W> UnaryService<Q> for Unary<C>
where
    C: FnOnce(Q) -> W,
    W: Future<Output = Result<A, SnapshotError>> + Send + 'static,
{
    type Response = A;
    type Future = BoxFuture<'static, Result<Response<A>, Status>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let work = self.0.take().map(|call| call(request.into_inner()));
        async move {
            match work {
                Some(work) => work.await.map(Response::new).map_err(|error| status(&error)),
                None => Err(Status::internal("a request was answered already")),
            }
        }
        .boxed()
    }
}

/// The method that lists snapshots.
struct Listing(Arc<Snapshotter>);

impl ServerStreamingService<ListRequest> for Listing {
    type Response = ListResponse;
    type ResponseStream = BoxStream<'static, Result<ListResponse, Status>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<ListRequest>) -> Self::Future {
        let listed = SnapshotFilters::parse(&request.into_inner().filters).map(|filters| {
            let found: Vec<InfoMessage> = self.0.list(&filters).into_iter().map(info_message).collect();
            let messages: Vec<_> = found
                .chunks(LISTED)
                .map(|part| Ok(ListResponse { info: part.to_vec() }))
                .collect();
            Response::new(futures::stream::iter(messages).boxed())
        });
        std::future::ready(listed.map_err(|error| status(&error)))
    }
}

/// Returns the name in a message, where an empty text stands for none.
fn named(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn mount_messages(steps: Vec<MountStep>) -> MountsResponse {
    let mounts = steps.into_iter().map(|step| MountMessage {
        r#type: step.fs_type,
        source: step.source,
        target: String::new(),
        options: step.options,
    });
    MountsResponse {
        mounts: mounts.collect(),
    }
}

fn info_message(record: SnapshotRecord) -> InfoMessage {
    let time = |time: SystemTime| Some(Timestamp::from(time));
    let kind = match record.kind {
        SnapshotKind::View => KindMessage::View,
        SnapshotKind::Active => KindMessage::Active,
        SnapshotKind::Committed => KindMessage::Committed,
    };
    InfoMessage {
        name: record.name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: time(record.created),
        updated_at: time(record.updated),
        labels: record.labels,
    }
}

/// Returns what containerd understands an error as (its package `errdefs`).
fn status(error: &SnapshotError) -> Status {
    let code = match error {
        SnapshotError::NotFound { .. } => Code::NotFound,
        SnapshotError::Exists { .. } => Code::AlreadyExists,
        SnapshotError::State { .. } => Code::FailedPrecondition,
        SnapshotError::Argument(_) => Code::InvalidArgument,
        SnapshotError::Image { .. } => Code::Unavailable,
        SnapshotError::Table { .. }
        | SnapshotError::Record { .. }
        | SnapshotError::Io { .. }
        | SnapshotError::Task(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}
