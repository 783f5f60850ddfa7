package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// server is one daemon process with its own root and socket.
type server struct {
	dir    string // short: a socket path has 108 bytes
	root   string
	socket string
	log    string

	args    []string
	env     []string
	command []string // what goes before the daemon's own path, e.g. a shell that sets a mask

	cmd  *exec.Cmd
	done chan struct{}
	conn *grpc.ClientConn
}

type option func(*server)

// withArgs adds flags to `serve`.
func withArgs(args ...string) option {
	return func(s *server) { s.args = append(s.args, args...) }
}

// withEnv adds variables to the daemon's environment.
func withEnv(env ...string) option {
	return func(s *server) { s.env = append(s.env, env...) }
}

// withRoot puts the root somewhere else than under the server's own directory.
func withRoot(root string) option {
	return func(s *server) { s.root = root }
}

// withCommand runs the daemon through another program.
func withCommand(command ...string) option {
	return func(s *server) { s.command = command }
}

// newServer makes the directory and starts the daemon; close ends both.
func newServer(opts ...option) (*server, error) {
	dir, err := os.MkdirTemp("", "sp-")
	if err != nil {
		return nil, err
	}
	s := &server{
		dir:    dir,
		root:   filepath.Join(dir, "root"),
		socket: filepath.Join(dir, "s"),
		log:    filepath.Join(dir, "log"),
	}
	for _, o := range opts {
		o(s)
	}
	if err := s.start(); err != nil {
		err = fmt.Errorf("%w\n%s", err, s.tail())
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// start runs `serve` and waits until the socket answers.
func (s *server) start() error {
	out, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	argv := append(append([]string{}, s.command...), binary, "serve",
		"--address", s.socket, "--root", s.root, "--log-level", "info")
	argv = append(argv, s.args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(environ(), s.env...)
	// The daemon must not outlive a test binary that was killed.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := startLocked(cmd); err != nil {
		return err
	}
	s.cmd, s.done = cmd, make(chan struct{})
	go func(done chan struct{}) {
		_ = cmd.Wait() // the state is read from cmd.ProcessState
		close(done)
	}(s.done)

	if s.conn, err = dial(s.socket); err != nil {
		return err
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := s.api().Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: name, Key: "ready?"})
		cancel()
		if status.Code(err) == codes.NotFound {
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("daemon ended at start: %v", cmd.ProcessState)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("daemon not ready after 20 s: %v", err)
		}
	}
}

// dial connects as containerd's plugin loader does. The backoff is shorter, so
// that a restart in a test costs milliseconds.
func dial(socket string) (*grpc.ClientConn, error) {
	b := backoff.DefaultConfig
	b.BaseDelay, b.MaxDelay = 5*time.Millisecond, 50*time.Millisecond
	return grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: b, MinConnectTimeout: time.Second}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
			grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
}

func (s *server) api() snapshotsapi.SnapshotsClient {
	return snapshotsapi.NewSnapshotsClient(s.conn)
}

func (s *server) snapshotter() snapshots.Snapshotter {
	return proxy.NewSnapshotter(s.api(), name)
}

// stop sends a signal and waits for the end of the process.
func (s *server) stop(sig os.Signal) error {
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
	if s.cmd == nil {
		return nil
	}
	select {
	case <-s.done: // already gone: that is an error of its own
		return fmt.Errorf("daemon was gone before its time: %v", s.cmd.ProcessState)
	default:
	}
	if err := s.cmd.Process.Signal(sig); err != nil {
		return err
	}
	select {
	case <-s.done:
	case <-time.After(45 * time.Second):
		_ = s.cmd.Process.Kill()
		<-s.done
		return fmt.Errorf("daemon did not end within 45 s of %v", sig)
	}
	state := s.cmd.ProcessState
	s.cmd = nil
	if sig == unix.SIGTERM && !state.Success() {
		return fmt.Errorf("daemon ended with %v on SIGTERM", state)
	}
	return nil
}

// restart ends the daemon with sig and starts it again on the same root.
func (s *server) restart(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := s.stop(sig); err != nil {
		t.Fatal(err)
	}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
}

// close ends the daemon and removes what it left, mounts first.
func (s *server) close() error {
	err := s.stop(unix.SIGTERM)
	for _, dir := range []string{s.root, s.dir} {
		// Never delete through a mount that a test left behind.
		if e := mount.UnmountRecursive(dir, unix.MNT_DETACH); e != nil {
			err = errors.Join(err, e)
			continue
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// tail returns the end of the daemon's log.
func (s *server) tail() string {
	data, err := os.ReadFile(s.log)
	if err != nil {
		return fmt.Sprintf("(no log: %v)", err)
	}
	const most = 16 << 10
	if len(data) > most {
		data = append([]byte("...\n"), data[len(data)-most:]...)
	}
	return "--- log of the daemon ---\n" + string(data) + "--- end of log ---"
}

// serve starts a daemon for one test and shows its log if the test fails.
func serve(t testing.TB, opts ...option) *server {
	t.Helper()
	s, err := newServer(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A panic is a failure even when every answer looked right.
		if data, err := os.ReadFile(s.log); err == nil && bytes.Contains(data, []byte("panicked at")) {
			t.Error("the daemon panicked")
		}
		if t.Failed() {
			t.Log(s.tail())
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// environ is this process's environment without the variables that would
// configure the daemon (and without SPEEDY_BIN, which it does not know).
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "SPEEDY_") })
}

// run executes another subcommand of the binary.
func (s *server) run(args ...string) (string, error) {
	cmd := exec.Command(binary, args...)
	cmd.Env = append(environ(), s.env...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%v: %w: %s", args, err, stderr.String())
	}
	return stdout.String(), err
}
