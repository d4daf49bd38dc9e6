//! The messages of containerd's snapshot service (its files api/services/snapshots/v1/snapshots.proto and
//! api/types/mount.proto). Field numbers and types are those of the files.

#![allow(missing_docs, reason = "containerd's files document the fields")]

use std::collections::BTreeMap;

use prost::{Enumeration, Message};
use prost_types::{FieldMask, Timestamp};

/// `PrepareSnapshotRequest`, and `ViewSnapshotRequest`, which has the same fields.
#[derive(Clone, PartialEq, Message)]
pub struct CreateRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, tag = "2")]
    pub key: String,
    #[prost(string, tag = "3")]
    pub parent: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

/// `MountsResponse`, and the responses to `Prepare` and `View`, which have the same field.
#[derive(Clone, PartialEq, Message)]
pub struct MountsResponse {
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<MountMessage>,
}

/// `containerd.types.Mount`.
#[derive(Clone, PartialEq, Message)]
pub struct MountMessage {
    #[prost(string, tag = "1")]
    pub r#type: String,
    #[prost(string, tag = "2")]
    pub source: String,
    #[prost(string, tag = "3")]
    pub target: String,
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// `MountsRequest`, and the requests of `Remove`, `Stat` and `Usage`, which have the same fields.
#[derive(Clone, PartialEq, Message)]
pub struct KeyRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, tag = "2")]
    pub key: String,
}

/// `CommitSnapshotRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct CommitRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub key: String,
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

/// `Kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum KindMessage {
    Unknown = 0,
    View = 1,
    Active = 2,
    Committed = 3,
}

/// `Info`.
#[derive(Clone, PartialEq, Message)]
pub struct InfoMessage {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub parent: String,
    #[prost(enumeration = "KindMessage", tag = "3")]
    pub kind: i32,
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    #[prost(btree_map = "string, string", tag = "6")]
    pub labels: BTreeMap<String, String>,
}

/// `StatSnapshotResponse`, and `UpdateSnapshotResponse`, which has the same field.
#[derive(Clone, PartialEq, Message)]
pub struct InfoResponse {
    #[prost(message, optional, tag = "1")]
    pub info: Option<InfoMessage>,
}

/// `UpdateSnapshotRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(message, optional, tag = "2")]
    pub info: Option<InfoMessage>,
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// `ListSnapshotsRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct ListRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// `ListSnapshotsResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<InfoMessage>,
}

/// `UsageResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct UsageResponse {
    #[prost(int64, tag = "1")]
    pub size: i64,
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

/// `CleanupRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct CleanupRequest {
    #[prost(string, tag = "1")]
    pub snapshotter: String,
}

/// `google.protobuf.Empty`.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct NoContent {}
