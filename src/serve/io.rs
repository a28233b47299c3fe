//! The byte stream under hyper: tells [`Activity`] what moves, and says on HTTP/1 what hyper leaves unsaid.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll, ready},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    activity::{Activity, Order},
    problem,
    request_line::RequestLine,
};

/// Read at once while a request head is expected.
const HEAD_PIECE: usize = 8192;

/// A stream that remembers whether its other end has said that nothing more will come.
struct Ending<I> {
    stream: I,
    is_over: bool,
}

impl<I: AsyncRead + Unpin> AsyncRead for Ending<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.remaining();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Poll::Ready(outcome) = &result {
            // One that fails after it said so is broken, which hyper is to hear.
            self.is_over = outcome.is_ok() && before > 0 && buf.remaining() == before;
        }
        result
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Ending<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A watched stream.
pub(super) struct Watched<I> {
    inner: TokioIo<Ending<I>>,
    activity: Arc<Activity>,
    member: Arc<AtomicU64>,
    said_timeout: bool,
    line: RequestLine,
    /// [`Activity::begun`] when `line` began.
    line_of: u32,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Watched<I> {
    pub(super) fn new(inner: I, activity: Arc<Activity>, member: Arc<AtomicU64>) -> Watched<I> {
        Watched {
            inner: TokioIo::new(Ending {
                stream: inner,
                is_over: false,
            }),
            activity,
            member,
            said_timeout: false,
            line: RequestLine::default(),
            line_of: 0,
        }
    }

    /// A request line may come, or the rest of it.
    fn expects_line(&mut self) -> bool {
        if self.activity.is_http2() || !self.activity.is_waiting() {
            return false;
        }
        let begun = self.activity.begun();
        if self.line_of != begun {
            (self.line, self.line_of) = (RequestLine::default(), begun);
        }
        !self.line.is_over()
    }

    fn poll_read_line(&mut self, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let mut piece = [MaybeUninit::uninit(); HEAD_PIECE];
        let wanted = buf.remaining().min(HEAD_PIECE);
        let mut read = ReadBuf::uninit(&mut piece[..wanted]);
        ready!(Pin::new(self.inner.inner_mut()).poll_read(cx, &mut read))?;
        self.line.take(read.filled_mut());
        buf.put_slice(read.filled());
        Poll::Ready(Ok(()))
    }

    /// A late request head: `408`, then end of file for hyper, which closes. Best effort: with nothing in flight the socket's buffer
    /// has room for it.
    fn say_timeout(&mut self, cx: &mut Context<'_>) {
        if !self.said_timeout {
            self.said_timeout = true;
            let _ = Pin::new(&mut self.inner).poll_write(cx, &problem::answer(408, &self.member));
        }
    }

    /// Replaces hyper's empty answer to a head it could not take by one with a problem document.
    fn reshape(&mut self, cx: &mut Context<'_>, head: &[u8]) -> Option<Poll<io::Result<usize>>> {
        if !self.activity.nothing_to_say() {
            return None;
        }
        let Some(status) = problem::automatic_status(head) else {
            if !head.starts_with(b"HTTP/1.") {
                // hyper speaks before the first request only in HTTP/2 (its SETTINGS).
                self.activity.note_http2();
            }
            return None;
        };
        let answer = problem::answer(status, &self.member);
        match Pin::new(&mut self.inner).poll_write(cx, &answer) {
            // Whatever was taken of it: the connection is closed after it.
            Poll::Ready(Ok(_)) => Some(Poll::Ready(Ok(head.len()))),
            Poll::Ready(Err(error)) => Some(Poll::Ready(Err(error))),
            Poll::Pending => Some(Poll::Pending),
        }
    }

    fn note(&self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(_) => self.activity.note_written(),
            Poll::Pending => self.activity.note_write_stalled(),
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Read for Watched<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.activity.order() == Order::HeadTimedOut {
            self.say_timeout(cx);
            return Poll::Ready(Ok(()));
        }
        let result = match self.expects_line() {
            true => self.poll_read_line(cx, buf),
            false => Pin::new(&mut self.inner).poll_read(cx, buf),
        };
        if result.is_pending() {
            return result;
        }
        if self.inner.inner().is_over && self.activity.note_half_closed() {
            // hyper would take it for a client that is gone, and drop the request.
            return Poll::Pending;
        }
        self.activity.note_read();
        result
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Write for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(result) = self.reshape(cx, buf) {
            return result;
        }
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.note(&result);
        result
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let [only] = bufs
            && let Some(result) = self.reshape(cx, only)
        {
            return result;
        }
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.note(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.activity.note_flushed();
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
