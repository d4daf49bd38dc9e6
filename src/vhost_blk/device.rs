//! The device of one connection: answers the messages of the monitor.

use std::fs::File;

use tokio::runtime::Handle;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::dirty::DirtyLog;
use super::eventfd::EventDescriptor;
use super::guest::Guest;
use super::inflight::Inflight;
use super::queue::{MOST_ENTRIES, Queue};
use super::request::SECTOR;
use crate::disk::{BLOCK, Disk};

/// Most virtqueues of a device. A monitor takes at most one for each processor of the guest. Each one in use has a
/// thread.
const MOST_QUEUES: u16 = 64;
/// Most memory regions of a guest.
const MOST_REGIONS: u64 = 509;
/// Most data segments of a request that the driver makes: a ring of 128 entries without header and status.
const SEGMENTS: u32 = 126;
/// Bytes of `struct virtio_blk_config` (include/uapi/linux/virtio_blk.h).
const CONFIG: usize = 60;

/// The features of the device, as bits.
fn features() -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
    ];
    let vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
    bits.iter().fold(vhost.bits(), |all, bit| all | 1 << bit)
}

/// The device, as one monitor sees it.
pub(super) struct Device {
    disk: Disk,
    runtime: Handle,
    /// The features that the monitor wants.
    wanted: u64,
    guest: Guest,
    dirty: Option<DirtyLog>,
    inflight: Option<Inflight>,
    /// The queues that the monitor has named so far. They are made when they are first named.
    queues: Vec<Queue>,
}

impl Device {
    pub(super) fn new(disk: Disk, runtime: Handle) -> Self {
        Self {
            disk,
            runtime,
            wanted: 0,
            guest: Guest::default(),
            dirty: None,
            inflight: None,
            queues: Vec::new(),
        }
    }

    /// Ends all queues. Reads that wait are given up.
    pub(super) fn close(&mut self) {
        self.queues.clear();
        self.guest = Guest::default();
    }

    /// The queue with this index.
    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        if index >= MOST_QUEUES.into() {
            return Err(Error::InvalidParam);
        }
        while self.queues.len() <= index as usize {
            let queue = Queue::new(self.disk.clone(), self.runtime.clone()).map_err(Error::ReqHandlerError)?;
            self.queues.push(queue);
            self.settle(self.queues.len() - 1);
        }
        Ok(&mut self.queues[index as usize])
    }

    /// Gives a queue the settings that all queues share: memory, features and log.
    fn settle(&self, index: usize) {
        let queue = &self.queues[index];
        queue.set_memory(self.guest.memory());
        queue.set_event_idx(self.wants(1 << VIRTIO_RING_F_EVENT_IDX));
        let logs = self.wants(VhostUserVirtioFeatures::LOG_ALL.bits());
        queue.set_dirty(self.dirty.clone().filter(|_| logs));
    }

    fn settle_all(&self) {
        (0..self.queues.len()).for_each(|index| self.settle(index));
    }

    fn wants(&self, bits: u64) -> bool {
        self.wanted & bits != 0
    }

    /// The configuration space: `struct virtio_blk_config`.
    fn config(&self) -> [u8; CONFIG] {
        let mut config = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(BLOCK as u32).to_le_bytes());
        put(34, &MOST_QUEUES.to_le_bytes());
        config
    }
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.wanted = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.wanted = 0;
        self.queues.clear();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features())
    }

    fn set_features(&mut self, wanted: u64) -> Result<()> {
        if wanted & !features() != 0 {
            return Err(Error::InvalidParam);
        }
        self.wanted = wanted;
        self.settle_all();
        if !self.wants(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()) {
            // Such a monitor has no message that lets a queue run.
            self.queues.iter().for_each(|queue| queue.enable(true));
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // The monitor does not send messages of features that it does not want, so there is nothing to remember.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(MOST_QUEUES.into())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.guest = Guest::map(regions, files).map_err(Error::ReqHandlerError)?;
        self.settle_all();
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MOST_REGIONS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.guest.regions() >= MOST_REGIONS {
            return Err(Error::InvalidParam);
        }
        self.guest.add(region, file).map_err(Error::ReqHandlerError)?;
        self.settle_all();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.guest.remove(region).map_err(Error::ReqHandlerError)?;
        self.settle_all();
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, entries: u32) -> Result<()> {
        self.queue(index)?.set_size(entries).map_err(Error::ReqHandlerError)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let address = |monitor| self.guest.address(monitor).ok_or(Error::InvalidParam);
        let (descriptors, available, used) = (address(descriptors)?, address(available)?, address(used)?);
        let queue = self.queue(index)?;
        queue
            .set_addresses(descriptors, available, used)
            .map_err(Error::ReqHandlerError)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.queue(index)?.set_base(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next = self.queue(index)?.stop();
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let Some(file) = file else {
            return unsupported("a queue without kicks");
        };
        let kick = EventDescriptor::from_monitor(file).map_err(Error::ReqHandlerError)?;
        let at_once = !self.wants(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        let inflight = self.inflight.clone();
        let queue = self.queue(index.into())?;
        let inflight = inflight.and_then(|inflight| inflight.queue(index.into(), queue.size()));
        if at_once {
            queue.enable(true);
        }
        queue.start(kick, inflight).map_err(Error::ReqHandlerError)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = file
            .map(EventDescriptor::from_monitor)
            .transpose()
            .map_err(Error::ReqHandlerError)?;
        self.queue(index.into())?.set_call(call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        // Errors of a queue are logged.
        self.queue(index.into()).map(drop)
    }

    fn set_vring_enable(&mut self, index: u32, enabled: bool) -> Result<()> {
        self.queue(index)?.enable(enabled);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (offset, size) = (offset as usize, size as usize);
        let config = self.config();
        let end = offset.checked_add(size).filter(|end| *end <= CONFIG);
        let end = end.ok_or(Error::InvalidParam)?;
        Ok(config[offset..end].to_vec())
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported("to change the configuration of a read-only disk")
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        if wanted.num_queues > MOST_QUEUES || wanted.queue_size > MOST_ENTRIES {
            return Err(Error::InvalidParam);
        }
        let (file, made) = Inflight::create(wanted.num_queues, wanted.queue_size).map_err(Error::ReqHandlerError)?;
        let kept = file.try_clone().map_err(Error::ReqHandlerError)?;
        self.inflight = Some(Inflight::map(&made, kept).map_err(Error::ReqHandlerError)?);
        Ok((made, file))
    }

    fn set_inflight_fd(&mut self, kept: &VhostUserInflight, file: File) -> Result<()> {
        if kept.num_queues > MOST_QUEUES || kept.queue_size > MOST_ENTRIES {
            return Err(Error::InvalidParam);
        }
        self.inflight = Some(Inflight::map(kept, file).map_err(Error::ReqHandlerError)?);
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.dirty = Some(DirtyLog::map(log, file).map_err(Error::ReqHandlerError)?);
        self.settle_all();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("a graphics device")
    }

    fn get_shared_object(&mut self, _id: VhostUserSharedMsg) -> Result<File> {
        unsupported("shared objects")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported("the state of a device that has none")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("the state of a device that has none")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory of the device")
    }
}
