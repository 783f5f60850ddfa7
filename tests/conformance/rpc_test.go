package conformance

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// The calls below go to the socket as they are: errors keep their gRPC status.

func limit() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 60*time.Second)
}

func (s *server) prepare(key, parent string, labels map[string]string) ([]mount.Mount, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{
		Snapshotter: name, Key: key, Parent: parent, Labels: labels,
	})
	return mount.FromProto(r.GetMounts()), err
}

func (s *server) view(key, parent string, labels map[string]string) ([]mount.Mount, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().View(ctx, &snapshotsapi.ViewSnapshotRequest{
		Snapshotter: name, Key: key, Parent: parent, Labels: labels,
	})
	return mount.FromProto(r.GetMounts()), err
}

func (s *server) mounts(key string) ([]mount.Mount, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: name, Key: key})
	return mount.FromProto(r.GetMounts()), err
}

func (s *server) commit(to, key, parent string, labels map[string]string) error {
	ctx, cancel := limit()
	defer cancel()
	_, err := s.api().Commit(ctx, &snapshotsapi.CommitSnapshotRequest{
		Snapshotter: name, Name: to, Key: key, Parent: parent, Labels: labels,
	})
	return err
}

func (s *server) remove(key string) error {
	ctx, cancel := limit()
	defer cancel()
	_, err := s.api().Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: name, Key: key})
	return err
}

func (s *server) stat(key string) (*snapshotsapi.Info, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: name, Key: key})
	return r.GetInfo(), err
}

func (s *server) update(info *snapshotsapi.Info, paths ...string) (*snapshotsapi.Info, error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().Update(ctx, &snapshotsapi.UpdateSnapshotRequest{
		Snapshotter: name, Info: info, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
	})
	return r.GetInfo(), err
}

func (s *server) usage(key string) (size, inodes int64, err error) {
	ctx, cancel := limit()
	defer cancel()
	r, err := s.api().Usage(ctx, &snapshotsapi.UsageRequest{Snapshotter: name, Key: key})
	return r.GetSize(), r.GetInodes(), err
}

func (s *server) cleanup() error {
	ctx, cancel := limit()
	defer cancel()
	_, err := s.api().Cleanup(ctx, &snapshotsapi.CleanupRequest{Snapshotter: name})
	return err
}

func (s *server) list(filters ...string) ([]*snapshotsapi.Info, error) {
	ctx, cancel := limit()
	defer cancel()
	stream, err := s.api().List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: name, Filters: filters})
	if err != nil {
		return nil, err
	}
	var all []*snapshotsapi.Info
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, r.GetInfo()...)
	}
}

// names lists the names that match, sorted.
func (s *server) names(t testing.TB, filters ...string) []string {
	t.Helper()
	infos, err := s.list(filters...)
	if err != nil {
		t.Fatalf("List(%q): %v", filters, err)
	}
	all := []string{}
	for _, i := range infos {
		all = append(all, i.GetName())
	}
	slices.Sort(all)
	return all
}

// must fails the test on any error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantCode checks the gRPC code of an answer and goes on.
func wantCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: code %v, want %v (%v)", what, got, want, err)
	}
}

// wantNames compares what List shows with the names given.
func (s *server) wantNames(t testing.TB, want ...string) {
	t.Helper()
	slices.Sort(want)
	if got := s.names(t); !slices.Equal(got, want) {
		t.Errorf("List shows %q, want %q", got, want)
	}
}

// layer commits a layer made by fill, which gets the mounted tree.
func (s *server) layer(t testing.TB, to, parent string, fill func(dir string)) {
	t.Helper()
	key := "fill " + to
	m, err := s.prepare(key, parent, nil)
	must(t, err)
	if fill != nil {
		mounted(t, m, fill)
	}
	must(t, s.commit(to, key, "", nil))
}

// mounted mounts for the time of fn, as the shim does.
func mounted(t testing.TB, m []mount.Mount, fn func(dir string)) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp-mnt-")
	must(t, err)
	defer os.Remove(dir)
	if err := mount.All(m, dir); err != nil {
		t.Fatalf("mount %v: %v", m, err)
	}
	defer func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}()
	fn(dir)
}

// upper is the directory that an active snapshot's changes go to.
func upper(t testing.TB, m []mount.Mount) string {
	t.Helper()
	if len(m) != 1 {
		t.Fatalf("want one mount, got %v", m)
	}
	if m[0].Type == "bind" {
		return m[0].Source
	}
	for _, o := range m[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	t.Fatalf("no upper directory in %v", m)
	return ""
}

// write makes a file and its directories.
func write(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

// wantFile compares a file's content.
func wantFile(t testing.TB, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(got) != want {
		t.Errorf("%s holds %.60q, want %.60q", path, got, want)
	}
}

// killed is the end that no program can prepare for.
const killed = unix.SIGKILL

// wantMounts compares two answers, order and all.
func wantMounts(t testing.TB, what string, got, want []mount.Mount) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: mounts %v, want %v", what, got, want)
	}
}
