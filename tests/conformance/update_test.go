package conformance

import (
	"maps"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// TestUpdate goes through all forms of the mask.
func TestUpdate(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)
	start := map[string]string{"a": "1", "b": "2", "dotted.key/x": "3"}

	for _, c := range []struct {
		what  string
		send  map[string]string
		paths []string
		want  map[string]string
	}{
		{"no mask replaces", map[string]string{"c": "9"}, nil, map[string]string{"c": "9"}},
		{"no mask, no labels", nil, nil, nil},
		{"no mask drops empty values", map[string]string{"a": "", "c": "9"}, nil, map[string]string{"c": "9"}},
		{"labels replaces", map[string]string{"c": "9"}, []string{"labels"}, map[string]string{"c": "9"}},
		{"labels, none sent", nil, []string{"labels"}, nil},
		{"one label set", map[string]string{"a": "9", "b": "ignored"}, []string{"labels.a"},
			map[string]string{"a": "9", "b": "2", "dotted.key/x": "3"}},
		{"one label added", map[string]string{"new": "9"}, []string{"labels.new"},
			map[string]string{"a": "1", "b": "2", "dotted.key/x": "3", "new": "9"}},
		{"dots belong to the key", map[string]string{"dotted.key/x": "9"}, []string{"labels.dotted.key/x"},
			map[string]string{"a": "1", "b": "2", "dotted.key/x": "9"}},
		{"a missing value deletes", nil, []string{"labels.a"}, map[string]string{"b": "2", "dotted.key/x": "3"}},
		{"an empty value deletes", map[string]string{"a": ""}, []string{"labels.a"},
			map[string]string{"b": "2", "dotted.key/x": "3"}},
		{"deleting what is not there", nil, []string{"labels.zz"}, start},
		{"several paths", map[string]string{"b": "9", "n": "9"}, []string{"labels.a", "labels.b", "labels.n"},
			map[string]string{"b": "9", "dotted.key/x": "3", "n": "9"}},
		{"the same path twice", map[string]string{"a": "9"}, []string{"labels.a", "labels.a"},
			map[string]string{"a": "9", "b": "2", "dotted.key/x": "3"}},
	} {
		for _, key := range familyNames {
			_, err := s.update(&snapshotsapi.Info{Name: key, Labels: start})
			must(t, err)
			before, err := s.stat(key)
			must(t, err)
			// All but the labels is meaningless in the request.
			got, err := s.update(&snapshotsapi.Info{
				Name: key, Parent: "ignored", Kind: snapshotsapi.Kind_COMMITTED, Labels: c.send,
			}, c.paths...)
			must(t, err)
			if !maps.Equal(got.GetLabels(), c.want) {
				t.Errorf("%s, %s: %v, want %v", c.what, key, got.GetLabels(), c.want)
			}
			after, err := s.stat(key)
			must(t, err)
			if !proto.Equal(got, after) {
				t.Errorf("%s, %s: answered %v but Stat says %v", c.what, key, got, after)
			}
			if !after.GetUpdatedAt().AsTime().After(before.GetUpdatedAt().AsTime()) {
				t.Errorf("%s, %s: updated_at did not move", c.what, key)
			}
			if after.GetParent() != before.GetParent() || after.GetKind() != before.GetKind() ||
				!proto.Equal(after.GetCreatedAt(), before.GetCreatedAt()) {
				t.Errorf("%s, %s: more than labels changed: %v, was %v", c.what, key, after, before)
			}
		}
	}

	t.Run("AllOrNothing", func(t *testing.T) {
		_, err := s.update(&snapshotsapi.Info{Name: "base", Labels: start})
		must(t, err)
		before, err := s.stat("base")
		must(t, err)
		_, err = s.update(&snapshotsapi.Info{Name: "base", Labels: map[string]string{"a": "9"}}, "labels.a", "parent")
		wantCode(t, "one bad path among good ones", err, codes.InvalidArgument)
		after, err := s.stat("base")
		must(t, err)
		if !proto.Equal(before, after) {
			t.Errorf("a refused Update changed %v to %v", before, after)
		}
	})

	t.Run("OldTimes", func(t *testing.T) {
		// Go sends year 1 for a time that is not set; the metadata layer always does.
		for _, ts := range []*timestamppb.Timestamp{
			nil,
			timestamppb.New(time.Time{}),
			{Seconds: -1, Nanos: 999999999},
			{Seconds: -1, Nanos: -1},
			{Seconds: 1 << 62},
			{Seconds: -1 << 63, Nanos: -1 << 31},
		} {
			_, err := s.update(&snapshotsapi.Info{
				Name: "active", CreatedAt: ts, UpdatedAt: ts, Labels: map[string]string{"t": "1"},
			})
			wantCode(t, "Update with times "+ts.String(), err, codes.OK)
		}
		info, err := s.stat("active")
		must(t, err)
		if age := time.Since(info.GetCreatedAt().AsTime()); age < 0 || age > time.Hour {
			t.Errorf("created_at came from the request: %v", info)
		}
	})
}
