//! A thread that chooses restarts beside the thread that decodes.
//!
//! Following the blocks takes about as long as decoding them, so it would slow a pass down. The thread starts with
//! the first frame that is worth following. Both queues between the threads are bounded: one by its capacity, the other
//! by the number of blocks.
//!
//! If the thread falls behind, the pass would have to wait for it. So the pass then does a part of the thread's work: it
//! decodes a block's sequences itself, if the block uses no table of an earlier block.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::block::Follower;
use super::frame::{BlockKind, FrameHeader};
use super::planner::{DecodedBlock, Planner};
use super::sequences::Sequence;
use crate::index::step::SpanRestart;

/// Blocks that wait for the thread. With fewer of them, one thread waits for the other more often. With more of them, a
/// pass takes more memory.
const QUEUE: usize = 12;
/// The pass decodes the sequences of a block only if they take at most this many bytes. Most blocks have half as many. With
/// a larger value, the queue takes more memory; with a smaller one, the pass can help less often.
const SEQUENCES: usize = 128 << 10;

/// What the thread is told.
#[derive(Debug)]
enum PlannerMessage {
    Begin(FrameHeader, u64),
    Block(DecodedBlock),
    GiveUp,
    End,
}

/// What the thread returns: restarts that it chose, or a block whose buffers can be used again.
#[derive(Debug)]
enum Returned {
    Chosen(Vec<SpanRestart>),
    Used(DecodedBlock),
}

/// The thread of a planner.
#[derive(Debug)]
struct PlannerThread {
    told: SyncSender<PlannerMessage>,
    returned: Receiver<Returned>,
    thread: JoinHandle<()>,
}

/// A planner in a thread of its own. If there is no thread to be had, there are no restarts inside frames.
#[derive(Debug)]
pub(super) struct PlannerWorker {
    spacing: u64,
    running: Option<PlannerThread>,
    refused: bool,
    buffers: Vec<DecodedBlock>,
    chosen: Vec<SpanRestart>,
}

impl PlannerWorker {
    /// Bytes of memory in the queues, and of free buffers: a block's content and its output are at most 128 KiB each. The
    /// thread itself has the sequences of a block, which may take half a megabyte.
    pub(super) const MEMORY: u64 = (QUEUE as u64 + 6) * ((256 << 10) + SEQUENCES as u64) + (512 << 10);

    pub(super) fn new(spacing: u64) -> Self {
        Self {
            spacing,
            running: None,
            refused: false,
            buffers: Vec::new(),
            chosen: Vec::new(),
        }
    }

    /// Begins a frame, of which the first block is at blob offset `offset`. Returns whether it is followed.
    pub(super) fn begin(&mut self, header: FrameHeader, offset: u64) -> bool {
        if self.running.is_none() && !self.refused {
            self.start();
        }
        self.tell(PlannerMessage::Begin(header, offset));
        self.running.is_some()
    }

    fn start(&mut self) {
        let (told, inbox) = sync_channel(QUEUE);
        let (outbox, returned) = channel();
        let mut planner = Planner::new(self.spacing);
        let work = move || {
            for told in inbox {
                match told {
                    PlannerMessage::Begin(header, offset) => planner.begin(header, offset),
                    PlannerMessage::Block(mut block) => {
                        planner.block(&mut block);
                        // The receiver lives as long as the sender of `inbox`.
                        drop(outbox.send(Returned::Used(block)));
                    }
                    PlannerMessage::GiveUp => planner.give_up(),
                    PlannerMessage::End => planner.end(),
                }
                let chosen = planner.take();
                if !chosen.is_empty() {
                    drop(outbox.send(Returned::Chosen(chosen)));
                }
            }
        };
        let thread = thread::Builder::new().name("zstd restarts".into()).spawn(work);
        self.refused = thread.is_err();
        self.running = thread.ok().map(|thread| PlannerThread { told, returned, thread });
    }

    /// Takes a block.
    pub(super) fn block(&mut self, block: DecodedBlock) {
        let Some(running) = &self.running else { return };
        let mut message = match running.told.try_send(PlannerMessage::Block(block)) {
            Ok(()) => return,
            Err(TrySendError::Full(refused) | TrySendError::Disconnected(refused)) => refused,
        };
        if let PlannerMessage::Block(block) = &mut message {
            // If this fails, the thread tries it again.
            block.are_decoded = decode(block).is_some();
        }
        self.tell(message);
    }

    /// Gives up the frame.
    pub(super) fn give_up(&mut self) {
        self.tell(PlannerMessage::GiveUp);
    }

    /// Ends the frame.
    pub(super) fn end(&mut self) {
        self.tell(PlannerMessage::End);
    }

    fn tell(&mut self, told: PlannerMessage) {
        if let Some(running) = &self.running
            && running.told.send(told).is_err()
        {
            // The thread panicked.
            self.join();
        }
    }

    /// Returns buffers for a block, if there are any to use again.
    pub(super) fn buffers(&mut self) -> Option<DecodedBlock> {
        self.look();
        self.buffers.pop()
    }

    /// Returns the restarts that were chosen since the last call.
    pub(super) fn take(&mut self) -> Vec<SpanRestart> {
        self.look();
        std::mem::take(&mut self.chosen)
    }

    fn look(&mut self) {
        if let Some(running) = &self.running {
            for returned in running.returned.try_iter() {
                match returned {
                    Returned::Chosen(chosen) => self.chosen.extend(chosen),
                    Returned::Used(block) => self.buffers.push(block),
                }
            }
        }
    }

    /// Waits until everything is decided.
    pub(super) fn finish(&mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(PlannerThread { told, returned, thread }) = self.running.take() else {
            return;
        };
        drop(told);
        let outcome = thread.join();
        for returned in returned {
            if let Returned::Chosen(chosen) = returned {
                self.chosen.extend(chosen);
            }
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Decodes the sequences of a block into it. Returns `None` if the block is not compressed, is not understood, uses tables of earlier
/// blocks or has too many sequences.
fn decode(block: &mut DecodedBlock) -> Option<()> {
    if block.kind != BlockKind::Compressed {
        return None;
    }
    let mut follower = Follower::new();
    let parts = follower.read(&block.content)?;
    if parts.count * size_of::<Sequence>() > SEQUENCES {
        return None;
    }
    follower.sequences(&block.content, &parts, &mut block.sequences)
}

#[cfg(test)]
mod tests {
    use super::super::context::ZstdContext;
    use super::super::frame::{BLOCK, BLOCK_HEADER, BlockHeader, FrameStart};
    use super::super::room_within;
    use super::super::sequences::PAD;
    use super::*;
    use crate::index::SpanId;

    const SPACING: u64 = 64 << 10;

    /// Returns the restarts that a planner finds in a blob of one frame, and how many blocks were decoded before it got
    /// them.
    fn plan(blob: &[u8], help: bool) -> (Vec<SpanRestart>, usize) {
        let FrameStart::Frame(header) = FrameStart::read(blob) else {
            panic!("no frame");
        };
        let mut context = ZstdContext::new(0, room_within(1 << 30)).unwrap();
        context.decode(&blob[..header.len], &mut [], 0).unwrap();
        let mut planner = Planner::new(SPACING);
        planner.begin(header, header.len as u64);
        let (mut at, mut made_before, mut spans, mut helped) = (header.len, 0, 0, 0);
        loop {
            let block = BlockHeader::read(*blob[at..].first_chunk().unwrap()).unwrap();
            let bytes = &blob[at..at + BLOCK_HEADER + block.content];
            let mut output = vec![0; BLOCK];
            let made = context.decode(bytes, &mut output, 0).unwrap().made;
            let begins = made_before >= (u64::from(spans) + 1) * SPACING;
            spans += u32::from(begins);
            let mut decoded = DecodedBlock {
                kind: block.kind,
                content: [&[0; PAD - BLOCK_HEADER], bytes].concat(),
                sequences: Vec::new(),
                are_decoded: false,
                output,
                made,
                candidate: begins.then_some((SpanId(spans), at as u64)),
            };
            if help {
                decoded.are_decoded = decode(&mut decoded).is_some();
                helped += usize::from(decoded.are_decoded);
            }
            planner.block(&mut decoded);
            at += bytes.len();
            made_before += made as u64;
            if block.last {
                break;
            }
        }
        planner.end();
        (planner.take(), helped)
    }

    #[test]
    fn restarts_do_not_depend_on_who_decodes_sequences() {
        let mut rng = fastrand::Rng::with_seed(9);
        let mut tar: Vec<u8> = Vec::new();
        while tar.len() < 12 << 20 {
            let len = rng.usize(4..200);
            if rng.bool() && tar.len() > 1000 {
                let from = tar.len() - rng.usize(300..1000);
                tar.extend_from_within(from..from + len.min(tar.len() - from));
            } else {
                tar.extend(std::iter::repeat_with(|| rng.u8(..)).take(len));
            }
        }
        let blob = zstd::bulk::compress(&tar, 3).unwrap();
        let (restarts, _) = plan(&blob, false);
        let (same, helped) = plan(&blob, true);
        assert!(!restarts.is_empty() && helped > 0);
        assert_eq!(restarts, same);
    }
}
